"""Lists, dicts and variables that live where the session runs, over all its traces."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, Self

from insitu._origin import Container, NodeReference, Origin, latest, not_here
from insitu._proxy import Proxy, as_meta, proxies_in, python_flow, wrap
from insitu._session import active_session
from insitu._shapes import Unknown, check_fits
from insitu._source import user_location
from insitu_wire.errors import Reason, error
from insitu_wire.operations import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from insitu._recorder import SessionRecorder
    from insitu_wire.errors import Location


class ProxyList(builtins.list[Any], Container):
    """A list that is built while the session runs; saved, it is that list after the block.

    It keeps copies of what is put into it.
    """

    def append(self, item: Any) -> None:
        """Adds an item at the end."""
        if self._is_there:
            super().append(item)
        else:
            _change(self, "append", item)

    def extend(self, items: Iterable[Any]) -> None:
        """Adds items at the end."""
        if self._is_there:
            super().extend(items)
        else:
            _change(self, "extend", items if isinstance(items, Container) else builtins.list(items))

    def __setitem__(self, key: Any, item: Any) -> None:
        if self._is_there:
            super().__setitem__(key, item)
        else:
            _change(self, "set_item", key, item)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if self._is_there else _item(self, key)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self._is_there else python_flow().items(self)

    def __len__(self) -> int:
        return super().__len__() if self._is_there else _length(self)

    def __bool__(self) -> bool:
        return bool(len(self))

    def __repr__(self) -> str:
        return super().__repr__() if self._is_there else f"<{self._origin}, not there yet>"

    def save(self) -> Self:
        """Marks the list to come back, as it is when the session ends."""
        _mark_saved(self)
        return self

    def _fill(self, value: Any) -> None:
        super().clear()
        super().extend(value)
        self._is_there = True


class ProxyMapping(builtins.dict[Any, Any], Container):
    """A dict that is built while the session runs; saved, it is that dict after the block.

    It keeps copies of what is put into it.
    """

    def __setitem__(self, key: Any, item: Any) -> None:
        if self._is_there:
            super().__setitem__(key, item)
        else:
            _change(self, "set_item", key, item)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if self._is_there else _item(self, key)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self._is_there else python_flow().items(self)

    def __len__(self) -> int:
        return super().__len__() if self._is_there else _length(self)

    def __bool__(self) -> bool:
        return bool(len(self))

    def __repr__(self) -> str:
        return super().__repr__() if self._is_there else f"<{self._origin}, not there yet>"

    def save(self) -> Self:
        """Marks the dict to come back, as it is when the session ends."""
        _mark_saved(self)
        return self

    def _fill(self, value: Any) -> None:
        super().clear()
        super().update(value)
        self._is_there = True


class Variable(Proxy):
    """A value that may get another value later, also in a loop or branch."""

    def update(self, value: Any) -> None:
        """Gives it another value of the same shape, from here on."""
        location = user_location()
        check_fits(self._meta, as_meta(value), str(self._origin), location)
        assign(self, value, location)


def list(items: Iterable[Any] = ()) -> ProxyList:
    """Makes a list that lives where the session runs, and may grow over traces and loops."""
    made = ProxyList()
    made._origin = _make("insitu.list", (builtins.list(items),), "list()")
    made._origin.recorder.containers.append(made)
    return made


def dict(items: Mapping[Any, Any] | None = None) -> ProxyMapping:
    """Makes a dict that lives where the session runs, and may grow over traces and loops."""
    made = ProxyMapping()
    made._origin = _make("insitu.dict", (builtins.dict(items or {}),), "dict()")
    made._origin.recorder.containers.append(made)
    return made


def variable(value: Any) -> Variable:
    """Makes a variable: `update` gives it another value, also in a loop or branch."""
    meta = as_meta(value)
    made = wrap(meta, _make(VARIABLE, (value,), "variable()"), Variable)
    if not isinstance(made, Variable):
        raise error(
            Reason.MALFORMED_SESSION,
            f"a variable holds a tensor, and not a {type(value).__name__}; use torch.tensor(...), "
            "insitu.list() or insitu.dict()",
            location=user_location(),
        )
    return made


def assign(target: Proxy, value: Any, location: Location) -> None:
    """Gives a variable another value, of any shape."""
    recorder = target._origin.recorder
    block = recorder.block
    target_id = target._origin.id()
    block.assign(target_id, value, location)
    origins = (target._origin, *(proxy._origin for proxy in proxies_in(value)))
    target._origin.moment = latest(origins, block.number)


def _recorder(location: Location) -> SessionRecorder:
    session = active_session()
    if session is None:
        raise error(
            Reason.MALFORMED_SESSION,
            "this lives where a session runs: make it inside a `with model.session():` block",
            location=location,
        )
    return session._recorder


def _make(name: str, args: tuple[Any, ...], description: str) -> Origin:
    location = user_location()
    recorder = _recorder(location)
    block = recorder.block
    moment = latest((proxy._origin for proxy in proxies_in(args)), block.number)
    node_id = block.call(name, args, {}, location)
    return Origin(recorder, location, description, node_id, moment=moment, scope=recorder.scope)


def _change(container: Container, word: str, *args: Any) -> None:
    origin = _recording(container)
    reference = NodeReference(origin.node_id)
    origin.recorder.block.call(f"insitu.{word}", (reference, *args), {}, user_location())


def _item(container: Container, key: Any) -> Any:
    origin = _recording(container)
    args = (NodeReference(origin.node_id), key)
    location = user_location()
    node_id = origin.recorder.block.call("operator.getitem", args, {}, location)
    description = f"{origin.description}[...]"
    scope = origin.recorder.scope
    return wrap(Unknown(), Origin(origin.recorder, location, description, node_id, scope=scope))


def _length(container: Container) -> int:
    raise not_here(container._origin)


def _mark_saved(container: Container) -> None:
    _recording(container)
    container._is_saved = True


def _recording(container: Container) -> Origin:
    if container._origin.recorder.state != "recording":
        raise not_here(container._origin)
    return container._origin

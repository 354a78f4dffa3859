"""Values that are not there yet: tensors, and structures of them, that record what is done to them.

A proxy is a tensor on the meta device: it has a shape and an element type and no elements. What the
user does to it runs on that shape at once, so that a misfit is an error at the user's own line, and
is recorded. When the session has run, a saved proxy becomes its value (`_fill.py`): the very same
object is then an ordinary tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch.utils import _pytree as pytree

from insitu._operations import operation_name
from insitu._origin import (
    Container,
    Moment,
    NodeReference,
    Origin,
    check_in_time,
    latest,
    missing,
    not_here,
)
from insitu._proxy_structures import ProxyDict, ProxyTuple, save
from insitu._shapes import KNOWN_WITHOUT_RUNNING, Unknown, infer
from insitu._source import user_location
from insitu_wire.errors import Reason, error
from insitu_wire.operations import is_in_place, last_word, may_alias, writing_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from insitu._gradients import Backward
    from insitu._handle import Handle
    from insitu_wire.errors import Location


class Proxy(torch.Tensor):
    """A tensor that will be there when the session has run, if it is saved.

    Operators, tensor methods and torch functions on it are recorded.
    """

    _origin: Origin
    _meta: torch.Tensor | None
    _is_parameter = False
    _also: Proxy | None = None
    """Another object that becomes the value together with this one."""

    @staticmethod
    def make(origin: Origin, meta: torch.Tensor | None, kind: type[Proxy] | None = None) -> Proxy:
        """Makes a proxy.

        Args:
            origin: where it comes from.
            meta: a tensor on the meta device with its shape and dtype; None where not known.
            kind: class of the proxy, by default Proxy.
        """
        shell = torch.empty(0, device="meta") if meta is None else meta
        with torch._C.DisableTorchFunctionSubclass():
            proxy = torch.Tensor._make_subclass(kind or Proxy, shell)
        proxy._origin = origin
        proxy._meta = meta
        return proxy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Records what torch is asked to do with proxies."""
        kwargs = kwargs or {}
        proxies = recorded_in((args, kwargs))
        if func in KNOWN_WITHOUT_RUNNING:
            meta = as_meta(proxies[0])
            if isinstance(meta, torch.Tensor):
                return KNOWN_WITHOUT_RUNNING[func](meta, *args[1:], **kwargs)
        return record(func, proxies, args, kwargs)

    def save(self) -> Self:
        """Marks the value to come back; after the session has run, this object is the value."""
        save(self, self._origin)
        return self

    def keep(self) -> Handle:
        """Keeps the value where the model runs, for later sessions of the same user.

        It stays until the handle's `release`, or until it has not been used for a time that the
        server sets (an hour); in this process until then or its end.
        """
        from insitu._handle import keep  # it is a proxy itself

        return keep(self)

    def backward(
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: object = None,
    ) -> Backward:
        """Begins a backward pass: `.grad` of a value is then the gradient of this one.

        Also as `with loss.backward():`, for gradients read inside the block.

        Args:
            gradient: the gradient of this value itself, of its shape; not needed for one element.
            retain_graph: taken for torch's sake: the graph is there until the trace ends.
            create_graph: not inside a trace.
            inputs: not inside a trace.
        """
        from insitu._gradients import backward

        return backward(self, gradient, create_graph=create_graph, inputs=inputs)

    @property
    def grad(self) -> Proxy:
        """The gradient of the last backward pass with respect to this value, of its shape.

        It is of that pass alone: passes do not add up. It is a value as any other; what is written
        to it, whole or in part, is what the pass goes on with to earlier values.
        """
        from insitu._gradients import gradient_by

        return Proxy.make(*gradient_by(self))

    @grad.setter
    def grad(self, value: object) -> None:
        from insitu._gradients import write_gradient

        write_gradient(self, value)

    def __iter__(self) -> Iterator[Proxy]:
        if self._meta is None:
            return iter(python_flow().items(self))
        return iter([cast("Proxy", self[index]) for index in range(len(self))])

    def __bool__(self) -> bool:
        return bool(python_flow().truth(self))

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return _describe(self)

    def __format__(self, format_spec: str) -> str:
        return _describe(self)


def python_flow() -> Any:
    """Gives the module that knows Python's own control flow."""
    # It records through proxies itself.
    from insitu import _python_flow as module

    return module


_NEEDS_ELEMENTS = {
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__complex__,
    torch.Tensor.__index__,
    torch.Tensor.__array__,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
}
"""What gives Python or numpy the elements themselves."""


def wrap(structure: Any, origin: Origin, kind: type[Proxy] | None = None) -> Any:
    """Puts proxies in the place of meta tensors, and of `UNKNOWN`, in a structure."""
    match structure:
        case torch.Tensor():
            return Proxy.make(origin, structure, kind)
        case tuple() | list():
            items = [wrap(item, origin.item(key)) for key, item in enumerate(structure)]
            proxies = ProxyTuple(items)
            proxies._origin = origin
            # Named tuples have these, and so have torch's return types, such as topk's.
            proxies._fields = getattr(type(structure), "__match_args__", ())
            return proxies
        case dict():
            mapping = ProxyDict({k: wrap(item, origin.item(k)) for k, item in structure.items()})
            mapping._origin = origin
            return mapping
        case Unknown():
            return Proxy.make(origin, None, kind)
    return structure


def reference(value: object) -> int | None:
    """Gives the node id of a recorded value; None for anything else."""
    match value:
        case Proxy() | Container():
            return value._origin.id()
        case NodeReference():
            return value.node_id
    return None


def proxies_in(value: Any) -> list[Proxy]:
    """Gives the proxies inside a value."""
    return [found for found in recorded_in(value) if isinstance(found, Proxy)]


def recorded_in(value: Any) -> list[Proxy | Container]:
    """Gives the proxies, and the lists and dicts of the session, inside a value."""
    kind = type(value)
    if isinstance(value, Proxy | Container):
        return [value]
    if kind in _PLAIN:
        return []
    if kind is slice:
        return recorded_in((value.start, value.stop, value.step))
    if kind in (tuple, list, ProxyTuple):
        return [found for item in value for found in recorded_in(item)]
    if kind in (dict, ProxyDict):
        return [found for item in value.values() for found in recorded_in(item)]
    if _is_leaf(value):
        return []
    # Other containers that torch knows, such as named tuples.
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Proxy | Container)]


# What most arguments are: to walk over these by hand takes a fifth of the time that pytree takes.
_PLAIN = {int, float, bool, str, type(None), type(...), torch.dtype, torch.device}


def _is_leaf(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def record(
    func: Callable[..., Any],
    proxies: list[Proxy | Container],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Records what torch is asked to do with values of a session.

    Args:
        func: the function, as torch names it.
        proxies: the values among its arguments, at least one.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    location = user_location()
    origin = proxies[0]._origin
    recorder = origin.recorder
    for proxy in proxies:
        if proxy._origin.recorder.state != "recording":
            raise not_here(proxy._origin)
        if proxy._origin.recorder is not recorder:
            raise error(
                Reason.UNKNOWN_REFERENCE,
                f"{proxy._origin} belongs to another session; keep both in one session, or save "
                "the value there and use the saved tensor here",
                location=location,
            )
    if func in _NEEDS_ELEMENTS:
        raise not_here(origin)
    name = operation_name(func, location)
    if is_in_place(name) and args and not isinstance(args[0], Proxy):
        raise error(
            Reason.UNKNOWN_OPERATION,
            f"{name} would write into a tensor of yours, which is not where the model runs; "
            "make it inside, as with torch.zeros_like(value), or collect values and torch.stack",
            location=location,
            operation=name,
        )
    if is_in_place(name) and isinstance(args[0], Proxy) and args[0]._is_parameter:
        raise error(
            Reason.UNKNOWN_OPERATION,
            f"{name} would write into a parameter; optimizers change it, and "
            "parameter.update(value) gives it another value",
            location=location,
            operation=name,
        )
    if option := writing_option(name, args, kwargs):
        raise error(
            Reason.UNKNOWN_OPERATION,
            f"{name} with {option}= does not run inside a session; use its result, or write it "
            "with [...] = ...",
            location=location,
            operation=name,
        )
    args, kwargs = _on_the_models_device(name, *_with_target_first(name, args, kwargs))
    structure = infer(func, name, as_meta((args, kwargs)), location)
    block = recorder.block
    moment = _moment(name, args, proxies, block.number, location)
    node_id = block.call(name, args, kwargs, location)
    word = last_word(name)
    suffix = "[...]" if word == "__getitem__" else f".{word}"
    description = origin.description + suffix
    made = Origin(recorder, location, description, node_id, moment=moment, scope=recorder.scope)
    if may_alias(name) and isinstance(args[0], Proxy):
        made.gradient = args[0]._origin.gradient
    if is_in_place(name) and made.gradient is not None:
        made.gradient.is_written(location)
    return wrap(structure, made)


def _moment(
    name: str,
    args: tuple[Any, ...],
    proxies: list[Proxy | Container],
    block_number: int,
    location: Location,
) -> Moment:
    """Tells when an operation's result is there, and refuses a write that would come too late."""
    moment = latest((proxy._origin for proxy in proxies), block_number)
    written_by = 0
    if may_alias(name) and isinstance(args[0], Proxy):
        target = args[0]._origin.moment
        written_by = target.written_by if target.block_number == block_number else 0
    if is_in_place(name):
        check_in_time(moment, written_by, location)
    return Moment(block_number, moment.reached_at, moment.waits_for, written_by)


def as_meta(value: Any) -> Any:
    """Puts meta tensors, or `Unknown`, in the place of recorded values and tensors."""
    kind = type(value)
    if isinstance(value, Proxy):
        return Unknown() if value._meta is None else value._meta
    if kind in _PLAIN:
        return value
    if kind is slice:
        return Unknown() if recorded_in(value) else value
    if kind in (tuple, ProxyTuple):
        return tuple([as_meta(item) for item in value])
    if kind is list:
        return [as_meta(item) for item in value]
    if kind in (dict, ProxyDict):
        return {key: as_meta(item) for key, item in value.items()}
    if isinstance(value, Container):
        return Unknown()
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta")
    # Other containers that torch knows, such as named tuples.
    return value if _is_leaf(value) else pytree.tree_map(as_meta, value)


def _with_target_first(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives what a view is made of the first place, also where it was passed as `input=`."""
    if args or not may_alias(name) or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {key: kwargs[key] for key in kwargs if key != "input"}


def _on_the_models_device(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Makes devices that are given as text devices: these travel as "where the model is"."""
    if name == "torch.Tensor.to":
        args = tuple(torch.device(arg) if isinstance(arg, str) else arg for arg in args)
    if isinstance(kwargs.get("device"), str):
        kwargs = {**kwargs, "device": torch.device(kwargs["device"])}
    return args, kwargs


def _describe(proxy: Proxy) -> str:
    meta = proxy._meta
    shape = (
        f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)}" if meta is not None else ""
    )
    return f"<{missing(proxy._origin)}{' ' + shape if shape else ''}>"

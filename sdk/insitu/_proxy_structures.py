"""Tuples and dictionaries of values that are not there yet, and how values come to be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from torch.utils import _pytree as pytree

from insitu._origin import not_here
from insitu._source import assigned_name, user_location

if TYPE_CHECKING:
    from insitu._origin import Origin


class ProxyTuple(tuple[Any, ...]):
    """A tuple of values that are not there yet; where torch names its items, so does this."""

    _origin: Origin
    _fields: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            has = f"only {', '.join(self._fields)}" if self._fields else "no names, only places"
            raise AttributeError(f"a tuple that has {has} has no {name!r}")
        return self[self._fields.index(name)]

    def save(self) -> Self:
        """Marks all values to come back."""
        save(self, self._origin)
        return self


class ProxyDict(dict[str, Any]):
    """A dictionary of values that are not there yet; its items are also attributes."""

    _origin: Origin

    def save(self) -> Self:
        """Marks all values to come back."""
        save(self, self._origin)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{self._origin} has {', '.join(self)}, and no {name}") from None


# Whoever looks for values inside an argument is to find those inside these.
pytree.register_pytree_node(
    ProxyTuple, lambda proxies: (list(proxies), None), lambda items, _: tuple(items)
)
pytree.register_pytree_node(
    ProxyDict,
    lambda proxies: (list(proxies.values()), list(proxies)),
    lambda items, keys: dict(zip(keys or (), items, strict=True)),
)


def save(value: object, origin: Origin) -> None:
    """Marks a value to come back, once.

    Args:
        value: the object that becomes its value.
        origin: where it comes from.
    """
    recorder = origin.recorder
    location = user_location()
    if recorder.state != "recording":
        raise not_here(origin)
    if recorder.is_saved(value):
        return
    name = assigned_name(location) or assigned_name(origin.location)
    recorder.block.save(value, name, location)

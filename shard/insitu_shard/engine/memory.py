"""Tells which values share memory, and copies those that must not or need not."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.graph import NodeId

_Key = TypeVar("_Key")
# No element of any dtype takes more bytes.
_ALIGNMENT = 16

StorageKey = int
"""Address of the memory that a tensor is a view of; unique among tensors that are alive."""


def storages(value: object) -> frozenset[StorageKey]:
    """Gives the memory of all tensors in a value."""
    return frozenset(_key(tensor) for tensor in _tensors(value))


class MemoryMap:
    """Remembers at which memory values were put, to find those that share it."""

    def __init__(self) -> None:
        self._node_ids: dict[StorageKey, set[NodeId]] = defaultdict(set)

    def add(self, node_id: NodeId, value: object) -> None:
        """Adds a value. Values are never taken out: whoever asks knows which are alive."""
        for key in storages(value):
            self._node_ids[key].add(node_id)

    def sharing(self, value: object) -> list[NodeId]:
        """Gives the nodes whose values may share memory with a value."""
        return sorted({node_id for key in storages(value) for node_id in self._node_ids[key]})


def copied(value: Any) -> Any:
    """Copies the tensors of a value, and the containers around them."""
    return _mapped(torch.clone, value)


def copied_if_in(memory: AbstractSet[StorageKey], value: object) -> object:
    """Copies the tensors of a value that lie in the given memory."""
    return _mapped(lambda tensor: tensor.clone() if _key(tensor) in memory else tensor, value)


def copied_together(values: Mapping[NodeId, object]) -> dict[NodeId, object]:
    """Copies values so that views of one memory stay views of one memory."""
    return copy.deepcopy(dict(values))


def parted(values: Mapping[_Key, object], memory: AbstractSet[StorageKey]) -> dict[_Key, object]:
    """Copies what values have of the given memory; views of one memory stay such.

    Args:
        values: values by any key.
        memory: what they are not to share any more.

    Returns:
        The values that had a part of it.
    """
    ours = {key: value for key, value in values.items() if not memory.isdisjoint(storages(value))}
    tensors = [tensor for value in ours.values() for tensor in _tensors(value)]
    regions: dict[StorageKey, tuple[int, int]] = {}
    for tensor in tensors:
        first, after = _region(tensor)
        known = regions.get(_key(tensor), (first, after))
        regions[_key(tensor)] = (min(known[0], first), max(known[1], after))
    copies: dict[StorageKey, torch.Tensor] = {}

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in memory:
            return tensor
        if is_traceable_wrapper_subclass(tensor) or tensor.is_conj() or not tensor.numel():
            return tensor.clone()
        first, after = regions[key]
        if key not in copies:
            copies[key] = _seen_as(tensor, torch.uint8, first, (after - first,), (1,)).clone()
        start = int(tensor.storage_offset()) * tensor.element_size() - first
        return _seen_as(copies[key], tensor.dtype, start, tensor.shape, tensor.stride())

    return {key: pytree.tree_map_only(torch.Tensor, copy_of, value) for key, value in ours.items()}


def seen_in_part(
    values: Iterable[object], memory: AbstractSet[StorageKey]
) -> AbstractSet[StorageKey]:
    """Gives the memory of which values have but a part, so that the rest could be freed."""
    whole: set[StorageKey] = set()
    for tensor in (tensor for value in values for tensor in _tensors(value)):
        if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
            whole.add(_key(tensor))
    return memory - whole


def compact(
    values: Mapping[NodeId, object], *, beside: Iterable[object] | None = None
) -> dict[NodeId, object]:
    """Copies tensors that are small views of a larger memory, so that the rest can be freed.

    Args:
        values: the values, by node.
        beside: if given, what shares memory with another of the values, or of these, goes on doing
            so, for it may be written to.
    """
    owners: Counter[StorageKey] = Counter()
    if beside is not None:
        owners.update(key for value in (*values.values(), *beside) for key in storages(value))

    def compacted(tensor: torch.Tensor) -> torch.Tensor:
        is_small = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        return tensor.clone() if is_small and owners[_key(tensor)] < 2 else tensor

    return {key: _mapped(compacted, value) for key, value in values.items()}


def _region(tensor: torch.Tensor) -> tuple[int, int]:
    """Gives the bytes of its memory that a tensor lies in; where it begins is aligned."""
    size = tensor.element_size()
    first = int(tensor.storage_offset())
    last = first + sum(
        (length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first * size // _ALIGNMENT * _ALIGNMENT, (last + 1) * size if tensor.numel() else 0


def _seen_as(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    first: int,
    shape: Sequence[int],
    strides: Sequence[int],
) -> torch.Tensor:
    """Gives another view of a tensor's memory, that begins at a byte of it."""
    view = torch.empty(0, dtype=dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), first // dtype.itemsize, shape, strides)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Applies a function to all tensors of a value, which most often is one."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return pytree.tree_map_only(torch.Tensor, function, value)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> StorageKey:
    # Tensor parallelism wraps its tensors; those have no memory themselves.
    while is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, inner[0])
    return tensor.untyped_storage().data_ptr()

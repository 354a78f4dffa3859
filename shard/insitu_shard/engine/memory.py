"""Tells which values share memory, and copies those that must not or need not."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.graph import NodeId

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
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


def copied_if_in(memory: AbstractSet[StorageKey], value: object) -> object:
    """Copies the tensors of a value that lie in the given memory."""
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.clone() if _key(tensor) in memory else tensor, value
    )


def copied_together(values: Mapping[NodeId, object]) -> dict[NodeId, object]:
    """Copies values so that views of one memory stay views of one memory."""
    return copy.deepcopy(dict(values))


def let_go_of_memory(values: dict[NodeId, Any], memory: AbstractSet[StorageKey]) -> None:
    """Copies the parts that values have of the given memory, so that the rest can be freed."""

    def let_go(tensor: torch.Tensor) -> torch.Tensor:
        is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        return tensor.clone() if is_part and _key(tensor) in memory else tensor

    for node_id, value in values.items():
        if isinstance(value, torch.Tensor):
            values[node_id] = let_go(value)
        else:
            values[node_id] = pytree.tree_map_only(torch.Tensor, let_go, value)


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

    return {
        key: pytree.tree_map_only(torch.Tensor, compacted, value) for key, value in values.items()
    }


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

"""Finds what part of a boundary's tensor nodes look at: of a split one no more is gathered.

What the nodes index is indexed in a tensor of the same shape that has no memory. The views that
come of it tell where in the tensor they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.graph import Call, Ref
from insitu_wire.operations import GETITEM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.plan import Plan


@dataclass(frozen=True, slots=True)
class Region:
    """A box in a tensor: of each dimension, the indices from a start up to a stop."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements."""
        return any(start >= stop for start, stop in zip(self.starts, self.stops, strict=True))

    def is_all_of(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a tensor of a shape."""
        return not any(self.starts) and self.stops == tuple(shape)

    def of(self, tensor: torch.Tensor, *, but: int | None = None) -> torch.Tensor:
        """Gives a view of what lies in it.

        Args:
            tensor: the tensor.
            but: a dimension that is left whole.
        """
        for dim, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            if dim != but:
                tensor = tensor.narrow(dim, start, stop - start)
        return tensor


def looked_at(plan: Plan, node_id: NodeId, value: Any) -> Iterator[Any]:
    """Yields what a block uses of a node's value: parts, if all that is done to it is indexing.

    Args:
        plan: the block.
        node_id: the node.
        value: the value.
    """
    users = [plan.nodes[at] for at in plan.successors.get(node_id, ()) if node_id in plan.uses[at]]
    if node_id in plan.outliving or not all(_only_indexes(user, node_id) for user in users):
        yield value
        return
    for user in users:
        try:
            part = value[user.operation.args[1]]  # type: ignore[union-attr]
        except (TypeError, IndexError, ValueError):
            yield value  # the node will say what is wrong
        else:
            yield from looked_at(plan, user.id, part)


def region_of(parts: Iterable[Any], whole: torch.Tensor) -> Region | None:
    """Gives the smallest region that has all parts; None if one is no view of the whole.

    Args:
        parts: what was made of the whole.
        whole: a contiguous tensor.
    """
    starts, stops = list(whole.shape), [0] * whole.ndim
    for part in parts:
        if not isinstance(part, torch.Tensor) or (part is not whole and part._base is not whole):
            return None
        if part.numel():
            first = int(part.storage_offset())
            steps = zip(part.shape, part.stride(), strict=True)
            last = first + sum((size - 1) * step for size, step in steps)
            at_first, at_last = _place(first, whole), _place(last, whole)
            starts = list(map(min, starts, at_first))
            stops = [max(stop, at + 1) for stop, at in zip(stops, at_last, strict=True)]
    return Region(tuple(starts), tuple(stops))


def _only_indexes(user: Node, node_id: NodeId) -> bool:
    """Whether all that a node does with another's value is to index it, by what is known now."""
    match user.operation:
        case Call(name=name, args=(Ref(node_id=target), index)) if name in GETITEM:
            return not user.condition and target == node_id and _is_plain(index)
    return False


def _is_plain(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    bounds = [(at.start, at.stop, at.step) if isinstance(at, slice) else (at,) for at in parts]
    return all(
        bound is None or bound is ... or type(bound) is int for each in bounds for bound in each
    )


def _place(offset: int, whole: torch.Tensor) -> list[int]:
    """Gives the indices of an element, by its place in the memory of a contiguous tensor."""
    return [offset // step % size for size, step in zip(whole.shape, whole.stride(), strict=True)]

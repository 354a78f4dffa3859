"""Finds the positions at which a trace reads the logits: the head need not run on the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_shard.engine.graph import Boundary, Call, Node, Read, Ref, references

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.engine.graph import Condition, NodeId

_GETITEM = {"torch.Tensor.__getitem__", "operator.getitem"}
# The logits are [batch, length, vocabulary].
_NUM_DIMS = 3

Positions = tuple[int, int]
"""The first position, and the one after the last."""


def trimmed(
    nodes: Sequence[Node], conditions: Sequence[Condition], head_path: str, length: int
) -> tuple[tuple[Node, ...], Positions | None]:
    """Gives a trace's nodes as they are where the head runs on the positions that they read.

    Args:
        nodes: the trace's.
        conditions: the trace's.
        head_path: path of the module that gives the logits.
        length: how many positions there are.

    Returns:
        The nodes, and the positions; None if the trace reads all, or none.
    """
    head = Boundary(head_path, False, 0)
    reads = {node.id for node in nodes if node.boundary == head}
    parts = _parts(nodes, conditions, reads, length) if reads and head_path else None
    if not parts:
        return tuple(nodes), None
    first = min(position.start for position in parts.values())
    after = max(position.stop for position in parts.values())
    if (first, after) == (0, length):
        return tuple(nodes), None
    shifted = (_shifted(node, first, length) if node.id in parts else node for node in nodes)
    return tuple(shifted), (first, after)


def _parts(
    nodes: Sequence[Node], conditions: Sequence[Condition], reads: set[NodeId], length: int
) -> dict[NodeId, range] | None:
    """Gives the positions that each use of the logits takes; None if one may take all."""
    parts: dict[NodeId, range] = {}
    for condition in conditions:
        if reads.intersection(references(condition.value)):
            return None
    for node in nodes:
        if node.id in reads:
            is_plain = isinstance(node.operation, Read) and not node.operation.hook_point.invoke
            if not is_plain:
                return None
        elif not reads.isdisjoint(node.used):
            positions = _positions(node, reads, length)
            if positions is None:
                return None
            parts[node.id] = positions
    return parts


def _positions(node: Node, reads: set[NodeId], length: int) -> range | None:
    match node.operation:
        case Call(name=name, args=(Ref(node_id=target), key)) if name in _GETITEM:
            keys = _keys(key)
            if target not in reads or keys is None:
                return None
            return _range(keys[1], length)
    return None


def _keys(key: object) -> tuple[object, ...] | None:
    """Gives an index as one that begins with the rows and the positions, if it is such."""
    if not isinstance(key, tuple) or any(part is None or isinstance(part, bool) for part in key):
        return None
    if (num_dots := sum(part is Ellipsis for part in key)) > 1:
        return None
    if num_dots:
        place = next(place for place, part in enumerate(key) if part is Ellipsis)
        dots = (slice(None),) * (_NUM_DIMS - len(key) + 1)
        key = (*key[:place], *dots, *key[place + 1 :])
    is_plain = len(key) >= 2 and all(isinstance(part, int | slice) for part in key[:2])
    return key if is_plain else None


def _range(key: object, length: int) -> range | None:
    match key:
        case int() if -length <= key < length:
            return range(key % length, key % length + 1)
        case slice() if all(
            part is None or isinstance(part, int) for part in (key.start, key.stop, key.step)
        ):
            part = range(length)[key]
            return part if part and part.step == 1 else None
    return None


def _shifted(node: Node, first: int, length: int) -> Node:
    call = node.operation
    assert isinstance(call, Call)
    keys = _keys(call.args[1])
    assert keys is not None
    part = _range(keys[1], length)
    assert part is not None
    moved: object = slice(part.start - first, part.stop - first)
    if isinstance(keys[1], int):
        moved = part.start - first
    args = (call.args[0], (keys[0], moved, *keys[2:]))
    return replace(node, operation=replace(call, args=args))

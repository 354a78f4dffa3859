"""Finds the positions at which a trace reads the logits: the head need not run on the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from insitu_shard.engine.graph import Boundary, Call, Node, Read, Ref, references
from insitu_wire.operations import GETITEM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.graph import Condition, NodeId

# The logits are [batch, length, vocabulary].
_NUM_DIMS = 3

Positions = tuple[int, int]
"""The first position, and the one after the last."""


def trimmed(
    nodes: Sequence[Node],
    conditions: Sequence[Condition],
    head_path: str,
    length: int,
    *,
    used_later: AbstractSet[NodeId] = frozenset(),
) -> tuple[tuple[Node, ...], Positions | None]:
    """Gives a trace's nodes as they are where the head runs on the positions that they read.

    Args:
        nodes: the trace's.
        conditions: the trace's.
        head_path: path of the module that gives the logits.
        length: how many positions there are.
        used_later: nodes whose values later steps use.

    Returns:
        The nodes, and the positions; None if the trace reads all, or none.
    """
    head = Boundary(head_path, False, 0)
    reads = {node.id for node in nodes if node.boundary == head}
    uses = _uses(nodes, conditions, reads, length) if reads and head_path else None
    if not uses or not uses.views.keys().isdisjoint(used_later):
        return tuple(nodes), None
    parts = uses.positions
    first = min(position.start for position in parts.values())
    after = max(position.stop for position in parts.values())
    if (first, after) == (0, length):
        return tuple(nodes), None
    shifted = (_shifted(node, uses, first) if node.id in parts else node for node in nodes)
    return tuple(shifted), (first, after)


class _Uses(NamedTuple):
    """How a trace uses the logits."""

    views: dict[NodeId, bool]
    """Nodes that show all positions, and whether they have rows, too."""
    positions: dict[NodeId, range]
    """The positions that each node takes of them."""


def _uses(
    nodes: Sequence[Node], conditions: Sequence[Condition], reads: set[NodeId], length: int
) -> _Uses | None:
    """Gives how logits are used; None if a node may take all positions."""
    uses = _Uses({}, {})
    for node in nodes:
        if node.id in reads:
            is_plain = isinstance(node.operation, Read) and not node.operation.hook_point.invoke
            if not is_plain:
                return None
            uses.views[node.id] = True
        elif not uses.views.keys().isdisjoint(node.used) and not _add_use(node, uses, length):
            return None
    used = {node_id for condition in conditions for node_id in references(condition.value)}
    return uses if uses.positions and used.isdisjoint(uses.views) else None


def _add_use(node: Node, uses: _Uses, length: int) -> bool:
    """Takes note of a use; False if it may take all positions."""
    match node.operation:
        case Call(name=name, args=(Ref(node_id=target), key)) if (
            name in GETITEM and target in uses.views
        ):
            if uses.views[target] and isinstance(key, int | slice) and not isinstance(key, bool):
                uses.views[node.id] = isinstance(key, slice)
                return True
            keys = _keys(key, has_rows=uses.views[target])
            positions = _range(keys[1], length) if keys else None
            if positions is not None:
                uses.positions[node.id] = positions
                return True
    return False


def _keys(key: object, *, has_rows: bool) -> tuple[object, ...] | None:
    """Gives an index as one that begins with the rows and the positions, if it is such."""
    if not has_rows:
        key = (slice(None), *(key if isinstance(key, tuple) else (key,)))
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


def _shifted(node: Node, uses: _Uses, first: int) -> Node:
    call = node.operation
    assert isinstance(call, Call)
    target, key = call.args
    assert isinstance(target, Ref)
    has_rows = uses.views[target.node_id]
    keys = _keys(key, has_rows=has_rows)
    assert keys is not None
    part = uses.positions[node.id]
    moved: object = slice(part.start - first, part.stop - first)
    if isinstance(keys[1], int):
        moved = part.start - first
    rows = keys[:1] if has_rows else ()
    return replace(node, operation=replace(call, args=(target, (*rows, moved, *keys[2:]))))

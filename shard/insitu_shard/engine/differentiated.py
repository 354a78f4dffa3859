"""Finds what a block takes gradients by. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_shard.engine.graph import Gradient, Read, Ref, references
from insitu_shard.engine.training_graph import Backward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from insitu_shard.engine.graph import Boundary, Node, NodeId


@dataclass(frozen=True, slots=True)
class Differentiated:
    """What a block takes gradients by."""

    gradients: Mapping[NodeId, Gradient]
    """The gradients, by their nodes."""
    backwards: Mapping[NodeId, Backward]
    """Those that parameters get, by their nodes."""
    values: frozenset[NodeId]
    """Nodes whose values the gradients are taken by, or are given another one at."""
    parameters: frozenset[NodeId]
    """The parameters that get gradients."""
    boundaries: frozenset[Boundary]
    """Where the model gives what the values are made of."""

    @property
    def passes(self) -> frozenset[tuple[object, ...]]:
        """What tells its backward passes apart."""
        taken: list[Gradient | Backward] = [*self.gradients.values(), *self.backwards.values()]
        return frozenset(map(pass_of, taken))


def differentiated(nodes: Sequence[Node]) -> Differentiated | None:
    """Finds what a block takes gradients by; None if it takes none."""
    gradients = {node.id: node.operation for node in nodes if isinstance(node.operation, Gradient)}
    backwards = {node.id: node.operation for node in nodes if isinstance(node.operation, Backward)}
    taken: list[Gradient | Backward] = [*gradients.values(), *backwards.values()]
    if not taken:
        return None
    by_id = {node.id: node for node in nodes}
    written = [value for each in taken for value, _ in each.written]
    values = frozenset(references([*(each.value for each in gradients.values()), *written]))
    made_of = _made_of(values, by_id)
    boundaries = {by_id[at].boundary for at in made_of if isinstance(by_id[at].operation, Read)}
    return Differentiated(
        gradients,
        backwards,
        values,
        frozenset(references([each.parameters for each in backwards.values()])),
        frozenset(filter(None, boundaries)),
    )


def pass_of(taken: Gradient | Backward) -> tuple[object, ...]:
    """Gives what tells a backward pass from others: its loss, and what gradients are given."""
    written = tuple((at, _identity(new)) for at, new in taken.written)
    return taken.loss, _identity(taken.gradient), written


def _identity(value: object) -> object:
    return value if isinstance(value, Ref | int | float | None) else id(value)


def _made_of(values: frozenset[NodeId], by_id: Mapping[NodeId, Node]) -> set[NodeId]:
    found: set[NodeId] = set()
    left = [value for value in values if value in by_id]
    while left:
        node_id = left.pop()
        if node_id not in found:
            found.add(node_id)
            left.extend(used for used in by_id[node_id].used if used in by_id)
    return found

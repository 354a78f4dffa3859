"""Tells which values later steps of a segment still use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.engine.graph import (
    Branch,
    Call,
    Compute,
    Log,
    Loop,
    Trace,
    references,
)
from insitu_wire.operations import is_in_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from insitu_shard.engine.graph import Node, NodeId, Step


class Liveness:
    """For each step of a segment, however deep: the ids that are used after it."""

    def __init__(self, steps: Sequence[Step], kept: Iterable[NodeId] = ()) -> None:
        """Looks through the steps.

        Args:
            steps: the segment's.
            kept: ids that later segments use.
        """
        self._used_after: dict[int, frozenset[NodeId]] = {}
        self._steps = steps  # keeps the steps, and so their identities
        self._visit(steps, frozenset(kept))

    def used_after(self, step: Step) -> frozenset[NodeId]:
        """Gives the ids that may be referred to after a step; in a loop, by the next item too."""
        return self._used_after[id(step)]

    def defined_in(self, loop: Loop) -> frozenset[NodeId]:
        """Gives the ids that the steps of a loop define."""
        return frozenset(_defined(loop.steps))

    def _visit(self, steps: Sequence[Step], used: frozenset[NodeId]) -> None:
        for step in reversed(steps):
            self._used_after[id(step)] = used
            match step.kind:
                case Loop(steps=inner):
                    self._visit(inner, used | frozenset(_used(inner)))
                case Branch(steps=inner, else_steps=others):
                    self._visit(inner, used)
                    self._visit(others, used)
            # What a step uses of its own is nothing to those before it.
            if new := set(_used([step])).difference(_defined([step]), used):
                used |= new


def has_in_place_call(steps: Sequence[Step]) -> bool:
    """Whether any step writes into an existing value."""
    operations = (node.operation for node in _nodes(steps))
    return any(isinstance(made, Call) and is_in_place(made.name) for made in operations)


def _used(steps: Sequence[Step]) -> Iterator[NodeId]:
    for node in _nodes(steps):
        yield from node.used
    for step in _all_steps(steps):
        match step.kind:
            case Trace(invokes=invokes, conditions=conditions):
                for invoke in invokes:
                    yield from references((invoke.token_ids, invoke.args, invoke.kwargs))
                yield from references([condition.value for condition in conditions])
            case Log(values=values):
                yield from references(list(values))
            case Loop(items=value) | Branch(condition=value):
                yield from references(value)


def _defined(steps: Sequence[Step]) -> Iterator[NodeId]:
    yield from (node.id for node in _nodes(steps))
    yield from (step.kind.item_node_id for step in _all_steps(steps) if isinstance(step.kind, Loop))


def _nodes(steps: Sequence[Step]) -> Iterator[Node]:
    for step in _all_steps(steps):
        if isinstance(step.kind, Trace | Compute):
            yield from step.kind.nodes


def _all_steps(steps: Sequence[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        match step.kind:
            case Loop(steps=inner):
                yield from _all_steps(inner)
            case Branch(steps=inner, else_steps=others):
                yield from _all_steps(inner)
                yield from _all_steps(others)

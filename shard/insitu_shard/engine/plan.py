"""Decides, before a trace runs, what each of its nodes waits for.

Inside a trace the order of definition is free: a node runs as soon as its values exist. Two things
restore what that order means. A node that uses a tensor waits for the in-place writes to it that
were defined before. And an in-place write that runs while an earlier-defined reader still waits
leaves that reader a copy of what was there. What shares memory is known by its roots: values made
from one root may be views of each other, and values without a common one never are (`execute.py`
sees to that).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_shard.engine.graph import (
    Boundary,
    Call,
    Node,
    NodeId,
    Read,
    Ref,
    Save,
    Write,
    operands,
    references,
)
from insitu_wire.operations import is_in_place, may_alias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from insitu_shard.engine.graph import Trace

Root = NodeId | Boundary
"""What owns memory: the node that made it, or the boundary that it was read at."""

# Values of earlier traces may share memory with each other: they count as one.
EARLIER: frozenset[Root] = frozenset({0})


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What each node of a trace waits for and leads to."""

    nodes: Mapping[NodeId, Node]
    """All nodes, in the order of definition."""
    predecessors: Mapping[NodeId, frozenset[NodeId]]
    """Nodes of this trace that must have run before."""
    successors: Mapping[NodeId, tuple[NodeId, ...]]
    """Nodes that wait for this one."""
    at_boundary: Mapping[Boundary, tuple[NodeId, ...]]
    """Reads and writes that run at a boundary."""
    due_at_boundary: Mapping[Boundary, tuple[NodeId, ...]]
    """Nodes that write the model's value at a boundary, so that later they would come too late."""
    readers_before: Mapping[NodeId, tuple[NodeId, ...]]
    """For an in-place write: earlier-defined readers of what it overwrites."""
    roots: Mapping[NodeId, frozenset[Root]]
    """What owns the memory of a node's value."""
    num_uses: Mapping[NodeId, int]
    """How many nodes of this trace use a node's value."""
    outliving: frozenset[NodeId]
    """Nodes whose value is needed after the trace."""
    writes_in_place: bool
    """Whether any node writes into an existing tensor."""


def plan_trace(trace: Trace, *, used_later: Iterable[NodeId]) -> TracePlan:
    """Plans one trace.

    Args:
        trace: the trace.
        used_later: ids that later steps of the session refer to.
    """
    planner = _Planner({node.id: node for node in trace.nodes})
    for node in trace.nodes:
        planner.add(node)
    return planner.finish(frozenset(used_later))


@dataclass(slots=True)
class _Planner:
    nodes: dict[NodeId, Node]
    roots: dict[NodeId, frozenset[Root]] = field(default_factory=dict)
    last_write: dict[Root, NodeId] = field(default_factory=dict)
    readers: dict[Root, list[NodeId]] = field(default_factory=lambda: defaultdict(list))
    predecessors: dict[NodeId, set[NodeId]] = field(default_factory=dict)
    readers_before: dict[NodeId, tuple[NodeId, ...]] = field(default_factory=dict)
    num_uses: dict[NodeId, int] = field(default_factory=lambda: defaultdict(int))
    due: dict[Boundary, list[NodeId]] = field(default_factory=lambda: defaultdict(list))

    def add(self, node: Node) -> None:
        """Adds the next node in the order of definition."""
        used = set(references(list(operands(node.operation))))
        used_here = used & self.nodes.keys()
        for node_id in used_here:
            self.num_uses[node_id] += 1
        used_roots = {root for node_id in used for root in self.roots.get(node_id, EARLIER)}
        waits = self.predecessors[node.id] = used_here
        waits.update(self.last_write[root] for root in used_roots if root in self.last_write)
        self.roots[node.id] = self._roots_of(node, used_roots)
        if (target := _target(node)) is not None:
            self._add_in_place(node, self.roots.get(target, EARLIER))
        if isinstance(node.operation, Write):
            self.due[node.operation.hook_point.boundary].append(node.id)
        for root in used_roots:
            self.readers[root].append(node.id)

    def _roots_of(self, node: Node, used_roots: set[Root]) -> frozenset[Root]:
        match node.operation:
            case Read(hook_point=point):
                return frozenset({point.boundary})
            # A view is of what it is called on, not of an index.
            case Call(name=name, args=(Ref(node_id=target), *_)) if may_alias(name):
                return self.roots.get(target, EARLIER)
            # Some operations take lists.
            case Call(name=name) if may_alias(name) and used_roots:
                return frozenset(used_roots)
            case Save() if used_roots:
                return frozenset(used_roots)
        return frozenset({node.id})

    def _add_in_place(self, node: Node, overwritten: frozenset[Root]) -> None:
        readers = {reader for root in overwritten for reader in self.readers[root]}
        # A view that is made later must show the write: so the write waits for it. Other readers
        # may run after the write, on a copy.
        views = {reader for reader in readers if self.roots[reader] & overwritten}
        self.predecessors[node.id] |= views - {node.id}
        self.readers_before[node.id] = tuple(sorted(readers - views))
        for root in overwritten:
            self.last_write[root] = node.id
            # Whoever writes next waits for this one.
            self.readers[root] = []
            if isinstance(root, Boundary):
                self.due[root].append(node.id)

    def finish(self, used_later: frozenset[NodeId]) -> TracePlan:
        """Gives the plan of what was added."""
        successors: dict[NodeId, list[NodeId]] = defaultdict(list)
        at_boundary: dict[Boundary, list[NodeId]] = defaultdict(list)
        for node in self.nodes.values():
            for predecessor in sorted(self.predecessors[node.id]):
                successors[predecessor].append(node.id)
            if node.boundary is not None:
                at_boundary[node.boundary].append(node.id)
        return TracePlan(
            nodes=self.nodes,
            predecessors={key: frozenset(value) for key, value in self.predecessors.items()},
            successors={key: tuple(value) for key, value in successors.items()},
            at_boundary={key: tuple(value) for key, value in at_boundary.items()},
            due_at_boundary={key: tuple(value) for key, value in self.due.items()},
            readers_before=self.readers_before,
            roots=self.roots,
            num_uses=dict(self.num_uses),
            outliving=used_later & self.nodes.keys(),
            writes_in_place=bool(self.readers_before),
        )


def _target(node: Node) -> NodeId | None:
    """Gives the node whose value an in-place operation writes into, if it is one."""
    match node.operation:
        case Call(name=name, args=(Ref(node_id=node_id), *_)) if is_in_place(name):
            return node_id
    return None

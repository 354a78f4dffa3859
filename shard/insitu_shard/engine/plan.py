"""Decides, before a block of nodes runs, what each of its nodes waits for.

Inside a trace the order of definition is free: a node runs as soon as its values exist. Two things
restore what that order means. A node that uses a tensor waits for the writes to it that were
defined before. And a write that runs while an earlier-defined reader still waits leaves that reader
what was there. What shares memory is known by its roots: values made from one root may be views of
each other, and values without a common one never are (`execute.py` sees to that).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_shard.engine.differentiated import differentiated
from insitu_shard.engine.graph import (
    Assign,
    Boundary,
    Call,
    Gradient,
    Node,
    NodeId,
    Read,
    Ref,
    Save,
    Side,
    Skip,
    Stop,
    Write,
    references,
)
from insitu_shard.engine.training_graph import Backward, OptimizerStep, Trainer
from insitu_wire.errors import Reason, error
from insitu_wire.operations import (
    LAST,
    SELECT,
    VARIABLE,
    is_in_place,
    may_alias,
    writes_into_container,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from insitu_shard.engine.differentiated import Differentiated
    from insitu_shard.engine.graph import Condition

Root = NodeId | tuple[Boundary, int]
"""What owns memory: the node that made it, or the boundary and invoke that it was read at; for the
value of an earlier step, its id negated."""

AT_END = -1
"""Stands for the step after the last one of a generation."""

# Values of earlier steps may share memory with each other: they have a root in common.
_ANY_EARLIER = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What each node of a block waits for and leads to."""

    nodes: Mapping[NodeId, Node]
    """All nodes, in the order of definition."""
    conditions: Sequence[Condition]
    """What nodes name by their `condition`."""
    uses: Mapping[NodeId, frozenset[NodeId]]
    """Nodes, of this block or earlier, whose values a node uses."""
    predecessors: Mapping[NodeId, frozenset[NodeId]]
    """Nodes of this block that must have run before."""
    successors: Mapping[NodeId, tuple[NodeId, ...]]
    """Nodes that wait for this one."""
    at_boundary: Mapping[Boundary, tuple[NodeId, ...]]
    """Reads, writes and skips that run at a boundary."""
    due_at_boundary: Mapping[Boundary, tuple[NodeId, ...]]
    """Nodes that write the model's value at a boundary, so that later they would come too late."""
    readers_before: Mapping[NodeId, tuple[NodeId, ...]]
    """For a write to a value: earlier-defined readers of what it overwrites."""
    roots: Mapping[NodeId, frozenset[Root]]
    """What owns the memory of a node's value."""
    num_uses: Mapping[NodeId, int]
    """How many nodes of this block use a node's value."""
    outliving: frozenset[NodeId]
    """Nodes whose value is needed after the block."""
    writes_in_place: bool
    """Whether any node writes into an existing value."""
    seen_by_invoke: frozenset[Boundary]
    """Boundaries at which nodes ask for the rows of an invoke."""
    inputs_seen: frozenset[Boundary]
    """Boundaries at which nodes ask for all arguments of the call."""
    differentiated: Differentiated | None
    """What its gradients are taken by; None if it takes none."""
    boundaries: Mapping[int, tuple[Boundary, ...]]
    """Boundaries of each pass; those of one that does not generate have step 0."""
    gated: Mapping[int, tuple[NodeId, ...]]
    """Nodes that may not run before a step begins, by its number; at the end those of -1."""

    def holds(self, boundary: Boundary) -> bool:
        """Whether the model goes on from a boundary with what nodes have seen."""
        is_begun = self.differentiated is not None and boundary in self.differentiated.boundaries
        return is_begun or boundary in self.due_at_boundary


def plan_nodes(
    nodes: Sequence[Node], conditions: Sequence[Condition] = (), *, used_later: Iterable[NodeId]
) -> Plan:
    """Plans one block: a trace, or a computation between traces.

    Args:
        nodes: its nodes, in the order of definition.
        conditions: what they name by their `condition`.
        used_later: ids that later steps of the session refer to.
    """
    planner = _Planner({node.id: node for node in nodes}, conditions)
    for node in nodes:
        planner.add(node)
    return planner.finish(frozenset(used_later))


@dataclass(slots=True)
class _Planner:
    nodes: dict[NodeId, Node]
    conditions: Sequence[Condition]
    roots: dict[NodeId, frozenset[Root]] = field(default_factory=dict)
    last_write: dict[Root, NodeId] = field(default_factory=dict)
    readers: dict[Root, list[NodeId]] = field(default_factory=lambda: defaultdict(list))
    uses: dict[NodeId, frozenset[NodeId]] = field(default_factory=dict)
    predecessors: dict[NodeId, set[NodeId]] = field(default_factory=dict)
    readers_before: dict[NodeId, tuple[NodeId, ...]] = field(default_factory=dict)
    num_uses: dict[NodeId, int] = field(default_factory=lambda: defaultdict(int))
    due: dict[Boundary, list[NodeId]] = field(default_factory=lambda: defaultdict(list))
    last_trainer: dict[NodeId, NodeId] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Adds the next node in the order of definition."""
        used = frozenset(node.used) | self._condition_uses(node)
        self.uses[node.id] = used
        used_here = used & self.nodes.keys()
        for node_id in used_here:
            self.num_uses[node_id] += 1
        used_roots = {root for node_id in used for root in self._roots(node_id)}
        waits = self.predecessors[node.id] = set(used_here)
        waits.update(self.last_write[root] for root in used_roots if root in self.last_write)
        waits.update(self._add_training(node))
        if isinstance(node.operation, Stop):
            waits.update(self.predecessors.keys() - {node.id})
        self.roots[node.id] = self._roots_of(node, used_roots)
        if overwritten := self._overwritten(node):
            self._add_write(node, overwritten)
        if isinstance(node.operation, Write | Skip) and node.boundary is not None:
            self.due[node.boundary].append(node.id)
        for root in used_roots:
            self.readers[root].append(node.id)

    def _add_training(self, node: Node) -> set[NodeId]:
        """Gives what a node waits for that has to do with the gradients of parameters."""
        operation = node.operation
        if not isinstance(operation, Trainer):
            return set()
        waits: set[NodeId] = set()
        for parameter in references(operation.parameters):
            if parameter in self.last_trainer:
                waits.add(self.last_trainer[parameter])
            self.last_trainer[parameter] = node.id
        if isinstance(operation, OptimizerStep):
            # Their graphs have the parameters as they are now.
            taken = (node for node in self.nodes.values() if node.id in self.predecessors)
            waits.update(at.id for at in taken if isinstance(at.operation, Gradient | Backward))
        return waits - {node.id}

    def _condition_uses(self, node: Node) -> frozenset[NodeId]:
        used: set[NodeId] = set()
        number = node.condition
        while number:
            condition = self.conditions[number - 1]
            used.update(references(condition.value))
            number = condition.parent
        return frozenset(used)

    def _roots(self, node_id: NodeId) -> frozenset[Root]:
        if node_id in self.roots:
            return self.roots[node_id]
        return frozenset({_ANY_EARLIER, -node_id})

    def _roots_of(self, node: Node, used_roots: set[Root]) -> frozenset[Root]:
        match node.operation:
            case Read(hook_point=point):
                return frozenset({(point.boundary, point.invoke)})
            case Call(name=name) if name in (VARIABLE, SELECT, LAST):
                return frozenset({node.id, *used_roots})
            # A view is of what it is called on, not of an index.
            case Call(name=name, args=(Ref(node_id=target), *_)) if may_alias(name):
                return self._roots(target)
            # Some operations take lists.
            case Call(name=name) if may_alias(name) and used_roots:
                return frozenset(used_roots)
            case Save() if used_roots:
                return frozenset(used_roots)
        return frozenset({node.id})

    def _overwritten(self, node: Node) -> frozenset[Root]:
        """Gives what a node writes into, if it does."""
        match node.operation:
            case Assign(target=target, value=value):
                own = self._own_root(target)
                aliases = {root for used in references(value) for root in self._roots(used)}
                self.roots[target] = self._roots(target) | aliases
                return own
            case Call(name=name, args=(Ref(node_id=target), *_)) if writes_into_container(name):
                return self._own_root(target)
            case Call(name=name, args=(Ref(node_id=target), *_)) if is_in_place(name):
                return self._roots(target)
            case OptimizerStep():
                return frozenset().union(*map(self._own_root, node.used))
        return frozenset()

    def _own_root(self, node_id: NodeId) -> frozenset[Root]:
        return frozenset({node_id if node_id in self.nodes else -node_id})

    def _add_write(self, node: Node, overwritten: frozenset[Root]) -> None:
        readers = {reader for root in overwritten for reader in self.readers[root]} - {node.id}
        # A view that is made later must show the write: so the write waits for it. Other readers
        # may run after the write, on a copy.
        views = {reader for reader in readers if self.roots[reader] & overwritten}
        self.predecessors[node.id] |= views
        self.readers_before[node.id] = tuple(sorted(readers - views))
        for root in overwritten:
            self.last_write[root] = node.id
            # Whoever writes next waits for this one.
            self.readers[root] = []
            if isinstance(root, tuple):
                self._check_invokes(node, *root)
                self.due[root[0]].append(node.id)

    def _check_invokes(self, writer: Node, boundary: Boundary, invoke: int) -> None:
        before = (node for node in self.nodes.values() if node.id < writer.id)
        points = (getattr(node.operation, "hook_point", None) for node in before)
        if not invoke and any(
            point and point.boundary == boundary and point.invoke for point in points
        ):
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                f"this writes to a part of {boundary.module_path} for the whole batch, after "
                "invokes have read or written their rows of it; put it before the invokes, or "
                "write the whole value, as in module.output = value",
                location=writer.location,
            )

    def finish(self, used_later: frozenset[NodeId]) -> Plan:
        """Gives the plan of what was added."""
        points = [
            node.operation.hook_point
            for node in self.nodes.values()
            if isinstance(node.operation, Read | Write)
        ]
        successors: dict[NodeId, list[NodeId]] = defaultdict(list)
        at_boundary: dict[Boundary, list[NodeId]] = defaultdict(list)
        for node in self.nodes.values():
            for predecessor in sorted(self.predecessors[node.id]):
                successors[predecessor].append(node.id)
            if node.boundary is not None:
                at_boundary[node.boundary].append(node.id)
        return Plan(
            nodes=self.nodes,
            conditions=self.conditions,
            uses=self.uses,
            predecessors={key: frozenset(value) for key, value in self.predecessors.items()},
            successors={key: tuple(value) for key, value in successors.items()},
            at_boundary={key: tuple(value) for key, value in at_boundary.items()},
            due_at_boundary={key: tuple(value) for key, value in self.due.items()},
            readers_before=self.readers_before,
            roots=self.roots,
            num_uses=dict(self.num_uses),
            outliving=used_later & self.nodes.keys(),
            writes_in_place=bool(self.readers_before),
            seen_by_invoke=frozenset(point.boundary for point in points if point.invoke),
            inputs_seen=frozenset(point.boundary for point in points if point.side is Side.INPUTS),
            differentiated=differentiated(list(self.nodes.values())),
            boundaries=_by_step(at_boundary),
            gated=_gated(self.nodes.values()),
        )


def _by_step(boundaries: Iterable[Boundary]) -> dict[int, tuple[Boundary, ...]]:
    steps: dict[int, list[Boundary]] = defaultdict(list)
    for boundary in boundaries:
        steps[boundary.step].append(boundary)
    return {step: tuple(those) for step, those in steps.items()}


def _gated(nodes: Iterable[Node]) -> dict[int, tuple[NodeId, ...]]:
    gated: dict[int, list[NodeId]] = defaultdict(list)
    for node in nodes:
        if node.waits_for_end:
            gated[AT_END].append(node.id)
        elif node.step and node.boundary is None:
            gated[node.step - 1].append(node.id)
    return {step: tuple(those) for step, those in gated.items()}

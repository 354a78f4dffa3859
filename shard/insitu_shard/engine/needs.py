"""What a block needs of the session: while its pass runs, and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.compiler import WindowStep
from insitu_shard.engine.graph import (
    Assign,
    Call,
    EndGeneration,
    Keep,
    Load,
    ModuleCall,
    Ref,
    Stop,
    references,
)
from insitu_shard.engine.training_graph import Trainer
from insitu_wire.operations import is_in_place, writes_into_container

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from insitu_shard.engine.graph import Node, NodeId
    from insitu_shard.engine.plan import Plan


class Needs:
    """What a block needs of the session, split by when it is needed."""

    def __init__(self, plan: Plan, inputs: Iterable[NodeId] = ()) -> None:
        """Looks through a block.

        Args:
            plan: the block's.
            inputs: ids of values of earlier steps that its input is made of.
        """
        self._plan = plan
        # A stop that hangs on a condition decides how far the pass goes.
        tied = [
            node.id
            for node in plan.nodes.values()
            if node.boundary is not None
            or isinstance(node.operation, EndGeneration)
            or (isinstance(node.operation, Stop) and node.condition)
        ]
        due = [node_id for writers in plan.due_at_boundary.values() for node_id in writers]
        self._in_pass = closure([*tied, *due], plan.predecessors)
        self._inputs = frozenset(inputs)
        self._written = {node.id: _written(node, plan) for node in plan.nodes.values()}

    def step(self, *, is_trace: bool) -> WindowStep:
        """Gives the block as the compiler's window sees it."""
        nodes = self._plan.nodes
        writes = {
            node_id for written in self._written.values() for node_id in written if node_id
        } - nodes.keys()
        return WindowStep(
            is_trace=is_trace,
            defines=frozenset(nodes),
            needs=self._inputs | self._earlier(self._in_pass),
            writes=frozenset(writes),
            writes_tensors=any(0 in written for written in self._written.values()),
            is_in_order=self.writes_in_pass
            or any(isinstance(nodes[node_id].operation, Load) for node_id in self._in_pass),
        )

    @property
    def writes_in_pass(self) -> bool:
        """Whether its pass writes into values of earlier steps, so that it can run but once."""
        return any(self._written[node_id] for node_id in self._in_pass)

    def deferred(
        self, is_there: Callable[[NodeId], bool], *, is_exact: bool = False
    ) -> frozenset[NodeId]:
        """Gives the nodes that wait until the pass is over and all earlier steps have ended.

        Args:
            is_there: whether a value of an earlier step may be used now.
            is_exact: whether calls of one module are to stay apart; else they wait for each other.
        """
        late = [] if is_exact else self._repeated_calls()
        late += [
            node.id
            for node in self._plan.nodes.values()
            if node.id not in self._in_pass
            and (
                self._written[node.id]
                or isinstance(node.operation, Load | Keep)
                or not all(map(is_there, self._earlier([node.id])))
            )
        ]
        # A stop does not use what comes before it: the pass need not go on until that has run.
        return frozenset(
            node_id
            for node_id in closure(late, self._plan.successors)
            if not isinstance(self._plan.nodes[node_id].operation, Stop)
        )

    def come_before_pass(self, node_ids: Iterable[NodeId]) -> bool:
        """Whether the pass waits for some of the nodes."""
        return not self._in_pass.isdisjoint(node_ids)

    def _repeated_calls(self) -> list[NodeId]:
        """Gives the calls of modules that nodes call several times: one call can do for all."""
        calls: dict[str, list[NodeId]] = {}
        for node in self._plan.nodes.values():
            if isinstance(node.operation, ModuleCall) and node.id not in self._in_pass:
                calls.setdefault(node.operation.module_path, []).append(node.id)
        return [node_id for ids in calls.values() if len(ids) > 1 for node_id in ids]

    def _earlier(self, node_ids: Iterable[NodeId]) -> frozenset[NodeId]:
        used = {node_id for user in node_ids for node_id in self._plan.uses[user]}
        return frozenset(used - self._plan.nodes.keys())


def closure(
    node_ids: Iterable[NodeId], neighbours: Mapping[NodeId, Iterable[NodeId]]
) -> set[NodeId]:
    """Gives nodes and all that can be reached from them."""
    waiting = list(node_ids)
    found = set(waiting)
    while waiting:
        new = set(neighbours.get(waiting.pop(), ())) - found
        found |= new
        waiting.extend(new)
    return found


def _written(node: Node, plan: Plan) -> frozenset[NodeId]:
    """Gives the values of earlier steps that a node writes into; 0 for what may be any of them."""
    match node.operation:
        case Assign(target=target):
            return frozenset({target} - plan.nodes.keys())
        case Call(name=name, args=(Ref(node_id=target), *_)) if writes_into_container(name):
            return frozenset({target} - plan.nodes.keys())
        case Call(name=name) if is_in_place(name) and 0 in plan.roots[node.id]:
            return frozenset({0})
        case operation if isinstance(operation, Trainer):
            return frozenset(references(operation.parameters)) - plan.nodes.keys()
    return frozenset()

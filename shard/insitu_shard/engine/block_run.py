"""Runs the nodes of one block, each as soon as its values exist."""

from __future__ import annotations

import heapq
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.cancellation import Cancellation
from insitu_shard.engine.execute import Executor
from insitu_shard.engine.failures import cyclic_write, not_reached
from insitu_shard.engine.gradients import Gradients
from insitu_shard.engine.graph import Gradient, ModuleCall, Read, Skip, Stop
from insitu_shard.engine.invokes import InvokesValue
from insitu_shard.engine.memory import storages
from insitu_shard.engine.needs import closure
from insitu_shard.engine.outcome import Outcome
from insitu_shard.engine.ranks import RankLostError
from insitu_shard.engine.regions import looked_at
from insitu_shard.engine.training_graph import Backward
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from insitu_shard.engine.boundary_value import BoundaryValue, InputValue, OutputValue
    from insitu_shard.engine.gradients import Asked
    from insitu_shard.engine.graph import Boundary, Node, NodeId
    from insitu_shard.engine.inputs import Batch
    from insitu_shard.engine.made import Made
    from insitu_shard.engine.memory import StorageKey
    from insitu_shard.engine.module import LoadedModule
    from insitu_shard.engine.plan import Plan

# What one rank must not do alone: it would wait for the others, or they for it.
_OF_ALL_RANKS = ModuleCall | Skip | Stop | Gradient | Backward


class BlockRun:
    """One run of a block: a trace, or a computation between traces.

    Whoever drives it calls `start`, then `at` whenever the model comes to a boundary, and `finish`.
    An operation that raises does not end the pass: a rank that stopped alone would leave the others
    waiting in their next collective. Its error is kept, and no node runs after it.

    Attributes:
        error: what the first failing operation raised, if one did.
        has_failed: whether one did on any rank, as far as the ranks know of each other.
        cancellation: whether nobody wants its values any more.
        plan: what it runs.
    """

    def __init__(
        self,
        plan: Plan,
        model: LoadedModule,
        earlier: Mapping[NodeId, object],
        seed: str,
        brought: AbstractSet[StorageKey] = frozenset(),
        handles: Mapping[str, object] = MappingProxyType({}),
        *,
        batch: Batch | None = None,
        deferred: AbstractSet[NodeId] = frozenset(),
        runs_to_end: bool = False,
        shares_backward: bool = False,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Makes a run.

        Args:
            plan: the block.
            model: what it runs on.
            earlier: values of earlier steps.
            seed: what makes its random numbers its own.
            brought: memory of the user's own tensors.
            handles: the user's values that earlier sessions kept.
            batch: which rows of its input are whose.
            deferred: nodes that run in `finish` only, as if they had run when it was their turn.
            runs_to_end: whether its generation is to go on though no node needs it.
            shares_backward: whether its gradients wait for `end_pass`.
            cancellation: its session's; None if it can not be cancelled.
        """
        self.plan = plan
        self._model = model
        wanted = plan.differentiated
        self._gradients = Gradients(wanted, shares_pass=shares_backward) if wanted else None
        self._executor = Executor(
            plan, model, earlier, seed, brought, handles, gradients=self._gradients
        )
        self._values = self._executor.values
        self._num_missing = {node_id: len(waits) for node_id, waits in plan.predecessors.items()}
        self._gated = dict(plan.gated)
        for node_id in (node_id for those in plan.gated.values() for node_id in those):
            self._num_missing[node_id] += 1
        self._after_pass: set[NodeId] = set()
        if wanted and shares_backward:
            self._after_pass = closure(wanted.gradients, plan.successors)
            for node_id in wanted.gradients:
                self._num_missing[node_id] += 1
        self._ready: list[NodeId] = []
        self._batch = batch
        self._deferred = deferred
        self._runs_to_end = runs_to_end
        self.cancellation = cancellation or Cancellation()
        self._turns: list[NodeId] = []
        self._num_turns = 0
        self._counted: frozenset[NodeId] | None = None
        self.error: Error | None = None
        self.has_failed = False

    @property
    def has_deferred(self) -> bool:
        """Whether `finish` has nodes to run."""
        return bool(self._deferred)

    @property
    def is_calling_module(self) -> bool:
        """Whether a module runs on a node's behalf, so that hooks stay silent."""
        return self._executor.is_calling_module

    @property
    def takes_gradients(self) -> bool:
        """Whether the pass has to keep a graph for it."""
        return self._gradients is not None

    @property
    def skips(self) -> Mapping[tuple[str, int, int], object]:
        """What skipped calls return, by module path, call index and step."""
        return self._executor.skips

    @property
    def needs_no_more(self) -> bool:
        """Whether no further boundary matters to it."""
        executor = self._executor
        if executor.stopped_at is not None:
            return True
        num_nodes = len(self.plan.nodes) - len(self._after_pass)
        return self._num_turns == num_nodes and not self._runs_to_end

    @property
    def takes_part(self) -> bool:
        """Whether it is to come to further boundaries.

        A rank that has failed goes on without running anything, so that it meets the others where
        they ask each other whether all go on.
        """
        return not self.has_failed and (self.error is None or self._is_split)

    def start(self) -> None:
        """Runs what waits for no boundary."""
        self._ready = [
            node.id
            for node in self.plan.nodes.values()
            if not self._num_missing[node.id] and self._can_run(node, None)
        ]
        self._run_ready(None, None)

    def begin_step(self, step: int, batch: Batch) -> None:
        """Runs what waits for a step of a generation and for no boundary.

        Args:
            step: its number, from 0.
            batch: which rows of the step's input are whose.
        """
        self._batch = batch
        self._open(self._gated.pop(step, ()))
        self._run_ready(None, None)

    def end_steps(self, made: Made) -> None:
        """Runs what waits for the end of a generation; what later steps were to give is not set."""
        self._executor.made = made
        self._runs_to_end = False
        self._open(node_id for those in self._gated.values() for node_id in those)
        self._gated.clear()
        for step, boundaries in self.plan.boundaries.items():
            if step >= made.num_steps:
                self._push(node_id for at in boundaries for node_id in self.plan.at_boundary[at])
        self._run_ready(None, None)

    @property
    def waits_for_backward(self) -> bool:
        """Whether its gradients wait for the end of its pass."""
        return bool(self._after_pass)

    def asked_gradients(self) -> Asked | None:
        """Gives what its backward pass is to give; None if that is not known, or nothing."""
        assert self._gradients is not None
        stopped = self._executor.stopped_at is not None
        if self.error is not None or self.has_failed or stopped:
            return None
        return self._executor.asked_gradients()

    def answer_gradients(self, asked: Asked, found: Sequence[torch.Tensor | None]) -> None:
        """Takes what a backward pass over several traces gave for this one."""
        assert self._gradients is not None
        self._gradients.answer(asked, found)

    def end_pass(self) -> None:
        """Runs what waits for gradients, after the pass that it shares with others."""
        assert self.plan.differentiated is not None
        self._after_pass.clear()
        self._open(self.plan.differentiated.gradients)
        self._run_ready(None, None)

    def take_ends(self) -> list[tuple[Node, object]]:
        """Gives nodes and values that ask for an end of the generation, each once."""
        ends, self._executor.ends = self._executor.ends, []
        return ends

    def _open(self, node_ids: Iterable[NodeId]) -> None:
        for node_id in node_ids:
            self._num_missing[node_id] -= 1
            self._push([node_id] if self._can_run(self.plan.nodes[node_id], None) else ())

    def _push(self, node_ids: Iterable[NodeId]) -> None:
        for node_id in node_ids:
            if not self._num_missing[node_id]:
                heapq.heappush(self._ready, node_id)

    def at(self, boundary: Boundary, whole: InputValue | OutputValue) -> Any:
        """Runs what waits for a boundary.

        Args:
            boundary: one that nodes wait for.
            whole: what the model holds there, of the block's rows.

        Returns:
            What the model is to go on with; None if that is what it holds.
        """
        if self._gradients is not None:
            is_written = boundary in self.plan.due_at_boundary
            whole = self._gradients.shown(boundary, whole, is_written=is_written)
        value = self._by_invoke(boundary, whole)
        self._run_boundary(boundary, value)
        if not self.plan.holds(boundary):
            return None
        if boundary.is_input and boundary in self.plan.due_at_boundary:
            self._check_arguments(boundary, value)
        return None if self.error else value.raw

    def looks_at(self, boundary: Boundary, whole: InputValue | OutputValue) -> Iterator[Any]:
        """Yields what its reads at a boundary use of what the model holds there."""
        value = self._by_invoke(boundary, whole)
        for node_id in self.plan.at_boundary[boundary]:
            if isinstance(read := self.plan.nodes[node_id].operation, Read):
                yield from looked_at(self.plan, node_id, value.read(read.hook_point))

    def let_go(self, memory: AbstractSet[StorageKey]) -> None:
        """Copies the parts that it has of memory which others are to free."""
        if not self.plan.readers_before.keys() <= self._values.done:
            return  # what is written to yet has to stay views of one memory
        self._values.let_go(memory)

    def part_from(self, memory: AbstractSet[StorageKey]) -> None:
        """Copies its values that share memory which others may write into."""
        self._values.part_from(memory)

    def has_written(self, boundary: Boundary) -> bool:
        """Whether it has made its writes at a boundary, and has not failed."""
        return self.error is None and self._values.done.issuperset(
            self.plan.due_at_boundary.get(boundary, ())
        )

    @property
    def memory(self) -> frozenset[StorageKey]:
        """The memory of its values."""
        return self._values.memory

    def finish(self) -> None:
        """Runs what was deferred, and sees to it that all has run."""
        if self.error is not None or not self.has_failed:
            self._run_deferred()
        unfinished = self.plan.nodes.keys() - self._values.done
        is_over = self.error is not None or self.has_failed
        if unfinished and not is_over and self._executor.stopped_at is None:
            self.error = not_reached(min(unfinished), self.plan)

    @property
    def outcome(self) -> Outcome:
        """What it has given so far."""
        return Outcome(self.plan, self._executor, self._counted, self.takes_gradients)

    def _by_invoke(self, boundary: Boundary, whole: InputValue | OutputValue) -> BoundaryValue:
        """Gives a value that shows each invoke its rows, if any node asks for those."""
        if self._batch is None or boundary not in self.plan.seen_by_invoke:
            return whole
        structure = self._model.structure(boundary.module_path, is_input=boundary.is_input)
        is_written = self.plan.holds(boundary)
        return InvokesValue(whole, structure, self._batch, is_written)

    def _check_arguments(self, boundary: Boundary, value: BoundaryValue) -> None:
        last_write = self.plan.nodes[self.plan.due_at_boundary[boundary][-1]]
        try:
            self._model.check_arguments(boundary.module_path, value.raw)
        except Error as err:
            err.location = last_write.location
            self.error = self.error or err

    def _run_boundary(self, boundary: Boundary, value: BoundaryValue) -> None:
        self._push(self.plan.at_boundary[boundary])
        self._run_ready(boundary, value)
        if self.needs_no_more:
            return
        writes = self.plan.due_at_boundary.get(boundary, ())
        late = [node_id for node_id in writes if node_id not in self._values.done]
        if late and self.error is None and not self.has_failed:
            self.error = cyclic_write(late[0], self.plan, self._values.done)
        if self._model.writes_in_place:
            self._values.part_from(storages(value.raw))

    def _run_ready(self, boundary: Boundary | None, value: BoundaryValue | None) -> None:
        """Runs every node that can run now, in the order of definition."""
        with torch.set_grad_enabled(self.takes_gradients):
            while self._ready and self.takes_part and self._executor.stopped_at is None:
                node = self.plan.nodes[heapq.heappop(self._ready)]
                if node.id not in self._deferred:
                    self._run_node(node, value)
                    if not self.takes_part:
                        return
                self._num_turns += 1
                if self.error is None:
                    self._turns.append(node.id)
                for successor_id in self.plan.successors.get(node.id, ()):
                    self._num_missing[successor_id] -= 1
                    if self._can_run(self.plan.nodes[successor_id], boundary):
                        heapq.heappush(self._ready, successor_id)

    def _run_node(self, node: Node, value: BoundaryValue | None) -> None:
        if self._is_split and isinstance(node.operation, _OF_ALL_RANKS) and not self._all_go_on():
            return
        if self.error is not None:
            return
        try:
            self._executor.run(node, value)
        except Error as err:
            self.error = err

    def _all_go_on(self) -> bool:
        """Whether no rank has failed. Every rank must call it."""
        self.has_failed = self._model.ranks.any(self.error is not None)
        return not self.has_failed

    def _run_deferred(self) -> None:
        """Runs the deferred nodes whose turn came before the pass was over, or failed."""
        waiting = [node_id for node_id in self._turns if node_id in self._deferred]
        has_failed_now = False
        with torch.set_grad_enabled(self.takes_gradients):
            while waiting:
                first = self.plan.nodes[waiting[0]]
                if self._is_split and isinstance(first.operation, ModuleCall | Gradient | Backward):
                    if self.has_failed or not self._all_go_on():
                        return
                elif has_failed_now and not self._is_split:
                    return
                for node in self._next(waiting):
                    has_failed_now = has_failed_now or not self._run_in_turn(node)

    def _run_in_turn(self, node: Node) -> bool:
        """Runs a deferred node; what came after it does not count if it fails."""
        try:
            self._executor.run(node, None)
        except Error as err:
            self.error = err
            self._counted = frozenset(self._turns[: self._turns.index(node.id)])
            return False
        return True

    @property
    def _is_split(self) -> bool:
        return self._model.ranks.size > 1

    def _next(self, waiting: list[NodeId]) -> list[Node]:
        """Takes the first that waits; a call of a module with all that can call the same."""
        node = self.plan.nodes[waiting.pop(0)]
        if not isinstance(node.operation, ModuleCall):
            return [node]
        path = node.operation.module_path
        alike = [node]
        for node_id in list(waiting):
            other = self.plan.nodes[node_id]
            is_alike = isinstance(other.operation, ModuleCall) and (
                other.operation.module_path == path
            )
            if is_alike and self.plan.predecessors[node_id] <= self._values.done:
                alike.append(other)
                waiting.remove(node_id)
        if len(alike) > 1:
            try:
                self._executor.call_ahead(alike)
            except RankLostError:
                raise
            except Exception:  # noqa: BLE001 - what is wrong with one is to be that one's error
                pass
        return alike

    def _can_run(self, node: Node, boundary: Boundary | None) -> bool:
        if self._num_missing[node.id]:
            return False
        return node.boundary in (None, boundary) or self._executor.is_over(node)

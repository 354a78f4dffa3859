"""Runs a segment: the steps of a session on one model, strictly in order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_shard.engine.codec import StepDecoder
from insitu_shard.engine.control import holds, items_of
from insitu_shard.engine.events import Logged, Saved, SegmentEvent, StepFollows, TraceStarted
from insitu_shard.engine.graph import (
    UNSET,
    Branch,
    Compute,
    Exit,
    Log,
    Loop,
    Node,
    Save,
    Trace,
    references,
    resolve,
)
from insitu_shard.engine.handles import KeptValues
from insitu_shard.engine.interleaver import Interleaver
from insitu_shard.engine.liveness import Liveness, has_in_place_call
from insitu_shard.engine.logs import format_values
from insitu_shard.engine.memory import compact, copied_if_in, copied_together, storages
from insitu_shard.engine.plan import plan_nodes
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from insitu_proto.v1 import shard_service_pb2
    from insitu_shard.engine.graph import NodeId, Step
    from insitu_shard.engine.inputs import ForwardInputs
    from insitu_shard.engine.module import LoadedModule
    from insitu_shard.engine.plan import Plan


class _Leave(Exception):  # noqa: N818 - no error: an exit was reached
    def __init__(self, loop: NodeId) -> None:
        super().__init__()
        self.loop = loop


class SegmentRun:
    """One run of a segment. Every rank of a group makes one and runs the same steps in turn.

    Attributes:
        has_exited: whether session.exit was reached; nothing of the session may run after.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModule],
        segment: shard_service_pb2.Segment,
        values: dict[NodeId, object],
        tensors: Sequence[torch.Tensor] = (),
        kept: Sequence[NodeId] = (),
        handles: KeptValues | None = None,
    ) -> None:
        """Decodes and prepares the steps.

        Args:
            models: the models that its traces run on, by name.
            segment: the steps.
            values: the session's values that outlive a step; read, added to, and freed at their
                last use.
            tensors: the session's list of tensors, on the model's device; they stay as they are.
            kept: ids of values that later segments use.
            handles: the user's values that are kept beyond sessions; read, and added to.
        """
        self._models = models
        self._handles = KeptValues(0) if handles is None else handles
        # Computations between traces run where any of its models is.
        self._any_model = next(iter(models.values()))
        decoder = StepDecoder(
            segment.locations,
            tensors=tensors,
            device=self._any_model.device,
            first_trace_number=segment.first_trace_number,
        )
        self._brought = storages(list(tensors))
        self._steps = decoder.steps(segment.steps)
        self._values = values
        self._liveness = Liveness(self._steps, kept)
        self._writes_in_place = bool(kept) or has_in_place_call(self._steps)
        self._seed = segment.seed
        self._num_runs: Counter[NodeId] = Counter()
        self._loops: list[NodeId] = []
        self._held: dict[NodeId, Saved] = {}
        self.has_exited = False

    def run(self) -> Iterator[SegmentEvent | StepFollows]:
        """Runs the steps and yields what they tell, with `StepFollows` before each that computes.

        Raises:
            Error: a step failed; the events of what ran before it in the step are not lost.
        """
        try:
            yield from self._run_steps(self._steps)
        except _Leave:
            self.has_exited = True
        yield from self._release_held()

    def _run_steps(self, steps: Sequence[Step]) -> Iterator[SegmentEvent | StepFollows]:
        for step in steps:
            try:
                yield from self._run_step(step)
            except Error as err:
                err.location = err.location or step.location
                yield from self._release_held()
                raise
            self._free(self._liveness.used_after(step))

    def _run_step(self, step: Step) -> Iterator[SegmentEvent | StepFollows]:
        match step.kind:
            case Trace() as trace:
                yield StepFollows()
                yield TraceStarted(step.trace_number)
                yield from self._run_trace(trace, step)
            case Compute(nodes=nodes, model=name):
                yield StepFollows()
                plan = plan_nodes(nodes, used_later=self._liveness.used_after(step))
                model = self._models[name] if name else self._any_model
                seed = self._block_seed(nodes, 0)
                interleaver = Interleaver(
                    plan, model, self._values, seed, self._brought, self._handles
                )
                interleaver.run(None)
                yield from self._finish(interleaver, plan, 0)
            case Log(values=logged):
                if isinstance(values := self._resolve(logged), tuple):
                    yield Logged(format_values(values))
            case Branch(condition=condition, steps=steps, else_steps=else_steps):
                if (value := self._resolve(condition)) is not UNSET:
                    yield from self._run_steps(steps if holds(value) else else_steps)
            case Loop() as loop:
                yield from self._run_loop(loop)
            case Exit(loop=loop_id):
                raise _Leave(loop_id)

    def _run_loop(self, loop: Loop) -> Iterator[SegmentEvent | StepFollows]:
        # Items may be written to.
        items = copied_if_in(self._brought, self._resolve(loop.items))
        self._loops.append(loop.item_node_id)
        try:
            for item in () if items is UNSET else items_of(items):
                # What an item's steps do not set is not what those of the item before set.
                for node_id in self._liveness.defined_in(loop):
                    self._values.pop(node_id, None)
                self._values[loop.item_node_id] = item
                yield from self._run_steps(loop.steps)
        except _Leave as leave:
            if leave.loop != loop.item_node_id:
                raise
        finally:
            self._loops.pop()
        if not self._loops:
            yield from self._release_held()

    def _run_trace(self, trace: Trace, step: Step) -> Iterator[SegmentEvent]:
        model = self._models[trace.model]
        try:
            inputs = self._inputs(trace, model)
        except Error as err:
            err.trace_number = step.trace_number
            raise
        if inputs is None:
            return
        plan = plan_nodes(trace.nodes, trace.conditions, used_later=self._liveness.used_after(step))
        seed = self._block_seed(trace.nodes, trace.seed)
        interleaver = Interleaver(plan, model, self._values, seed, self._brought, self._handles)
        interleaver.run(inputs)
        yield from self._finish(interleaver, plan, step.trace_number)

    def _block_seed(self, nodes: Sequence[Node], seed: int) -> str:
        """Gives what makes the random numbers of a block its own, and those of each item."""
        first_id = nodes[0].id if nodes else 0
        self._num_runs[first_id] += 1
        return f"{seed or self._seed}:{self._num_runs[first_id]}"

    def _inputs(self, trace: Trace, model: LoadedModule) -> ForwardInputs | None:
        """Gives what a trace runs over; None if what that is made of was not set."""
        invokes = []
        for invoke in trace.invokes:
            values = self._resolve((invoke.token_ids, invoke.args, invoke.kwargs))
            if not isinstance(values, tuple):
                return None
            token_ids, args, kwargs = values
            invokes.append(replace(invoke, token_ids=token_ids, args=args, kwargs=kwargs))
        return model.forward_inputs(invokes)

    def _finish(
        self, interleaver: Interleaver, plan: Plan, trace_number: int
    ) -> Iterator[SegmentEvent]:
        has_failed = self._any_model.ranks.any(interleaver.error is not None)
        for message in interleaver.logs:
            yield Logged(message)
        if has_failed:
            err = interleaver.error or error(
                Reason.INTERVENTION_RAISED, "the trace failed on another rank of the shard group"
            )
            err.trace_number = trace_number
            raise err
        self._handles.keep(interleaver.kept)
        outliving = interleaver.outliving
        beside = list(self._values.values()) if self._writes_in_place else None
        self._values.update(compact(outliving, beside=beside))
        # What stays here may still be written to: the receiver gets memory of its own.
        saved = compact(interleaver.saved)
        if outliving:
            saved = copied_together(saved)
        yield from self._saved(saved, plan.nodes)

    def _saved(
        self, values: Mapping[NodeId, object], nodes: Mapping[NodeId, Node]
    ) -> Iterator[Saved]:
        for node_id, value in sorted(values.items()):
            operation = nodes[node_id].operation
            name = operation.name if isinstance(operation, Save) else ""
            event = Saved(node_id, name, value)
            if self._loops:
                # A later item may save it again: the last one counts.
                self._held[node_id] = event
            else:
                yield event

    def _release_held(self) -> Iterator[Saved]:
        yield from self._held.values()
        self._held.clear()

    def _resolve(self, value: object) -> object:
        """Puts values in the place of references; UNSET if one is not set."""
        if any(node_id not in self._values for node_id in references(value)):
            return UNSET
        return resolve(value, self._values.__getitem__)

    def _free(self, used_later: frozenset[NodeId]) -> None:
        for node_id in self._values.keys() - used_later:
            del self._values[node_id]

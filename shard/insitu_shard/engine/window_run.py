"""Runs steps that need no decision between them: passes when they can, ends in order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from insitu_shard.compiler import Window, WindowStep
from insitu_shard.engine.block_run import BlockRun
from insitu_shard.engine.events import Logged, Saved, StepFollows, TraceStarted
from insitu_shard.engine.graph import Branch, Compute, Exit, Log, Loop, Save, Trace
from insitu_shard.engine.logs import format_values
from insitu_shard.engine.memory import compact, copied_together
from insitu_shard.engine.needs import Needs
from insitu_shard.engine.pass_run import run_next_pass
from insitu_shard.engine.pending import Pending
from insitu_shard.engine.plan import plan_nodes
from insitu_shard.engine.trace_run import TraceRun
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insitu_shard.engine.events import SegmentEvent
    from insitu_shard.engine.graph import Step
    from insitu_shard.engine.plan import Plan
    from insitu_shard.engine.session_state import SessionState


def windows(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Cuts steps where a decision is made at run time: loops, branches and exits stand alone."""
    window: list[Step] = []
    for step in steps:
        if not isinstance(step.kind, Loop | Branch | Exit):
            window.append(step)
            continue
        if window:
            yield window
        window = []
        yield [step]
    if window:
        yield window


def prepared(step: Step, state: SessionState) -> TraceRun | Between:
    """Plans a step: a trace, or what is between traces."""
    match step.kind:
        case Trace() as trace:
            return TraceRun(step, trace, state)
        case Compute(nodes=nodes):
            used_later = state.liveness.used_after(step)
            return Between(plan_nodes(nodes, used_later=used_later))
    return Between(None)


class WindowRun:
    """One run of traces, computations and logs that follow each other."""

    def __init__(self, steps: Sequence[Step], state: SessionState) -> None:
        self._steps = steps
        self._state = state
        self._blocks = [prepared(step, state) for step in steps]
        self._window = Window([block.window_step for block in self._blocks])
        self._num_announced = 0
        self._first_failed = len(steps)

    def run(self) -> Iterator[SegmentEvent | StepFollows]:
        """Runs the steps and yields what they tell, in the order of definition.

        Raises:
            Error: a step failed; what steps before it tell has been yielded.
        """
        try:
            yield from self._run()
        finally:
            for block in self._blocks:
                if isinstance(block, TraceRun):
                    block.leave()

    def _run(self) -> Iterator[SegmentEvent | StepFollows]:
        while (head := self._window.head) is not None:
            step, block = self._steps[head], self._blocks[head]
            try:
                if isinstance(block, TraceRun) and self._num_announced <= head:
                    self._num_announced = head + 1
                    yield TraceStarted(step.trace_number, block.num_tokens)
                if isinstance(block, TraceRun) and not block.has_run:
                    yield from self._run_pass(head)
                    yield from block.new_tokens()
                    continue
                yield from self._end(step, block)
            except Error as err:
                err.location = err.location or step.location
                raise
            self._window.ended()
            self._state.free(self._state.liveness.used_after(step))

    def _run_pass(self, head: int) -> Iterator[StepFollows]:
        """Has the head's pass run, and with it others that may run now."""
        ready = self._ready(head)
        pending = [
            Pending(trace, partial(self._window.is_there, place=place))
            for place, trace in ready
            if trace.facts is not None
        ]
        yield StepFollows(pending)
        if pending and not pending[0].trace.has_run:
            run_next_pass(pending, self._state.options.limits)
        for place, trace in ready:
            if trace.has_run:
                block = None if trace.has_failed else trace.block
                values = block.outcome.outliving if block else {}
                self._state.early.update(values)
                self._window.ran(place, values.keys())
            if trace.has_failed:
                self._first_failed = min(place, self._first_failed)

    def _ready(self, head: int) -> list[tuple[int, TraceRun]]:
        """Gives the traces that may run now, but none after one that has failed."""
        places = [head] if self._state.options.is_exact else self._window.ready()
        return [
            (place, trace)
            for place in places
            if place <= self._first_failed and isinstance(trace := self._blocks[place], TraceRun)
        ]

    def _end(self, step: Step, block: TraceRun | Between) -> Iterator[SegmentEvent | StepFollows]:
        match step.kind:
            case Log(values=logged):
                if isinstance(values := self._state.resolve(logged), tuple):
                    yield Logged(format_values(values))
            case Compute() as compute:
                yield StepFollows()
                assert isinstance(block, Between)
                yield from self._compute(compute, block)
            case _:
                assert isinstance(block, TraceRun)
                yield from self._end_trace(block)

    def _compute(self, compute: Compute, block: Between) -> Iterator[SegmentEvent]:
        assert block.plan is not None
        state = self._state
        run = BlockRun(
            block.plan,
            state.models[compute.model] if compute.model else state.any_model,
            state.earlier,
            state.block_seed(compute.nodes, 0),
            state.brought,
            state.handles,
        )
        run.start()
        run.finish()
        run.has_failed = state.any_model.ranks.any(run.error is not None)
        yield from self._told(run, block.plan, 0)

    def _end_trace(self, trace: TraceRun) -> Iterator[SegmentEvent]:
        yield from trace.new_tokens()
        if trace.error is not None:
            raise trace.error
        if trace.block is None or trace.plan is None:
            return
        for node_id in trace.plan.nodes:
            self._state.early.pop(node_id, None)
        had_deferred = trace.block.has_deferred
        trace.block.finish()
        if trace.remark:
            yield Logged(trace.remark)
        trace.block.has_failed |= trace.block.error is not None
        if had_deferred:
            trace.block.has_failed = trace.model.ranks.any(trace.block.has_failed)
        yield from self._told(trace.block, trace.plan, trace.trace_number)
        trace.block = None

    def _told(self, run: BlockRun, plan: Plan, trace_number: int) -> Iterator[SegmentEvent]:
        """Yields what a block tells, and keeps what it gives to later steps."""
        outcome = run.outcome
        for message in outcome.logs:
            yield Logged(message)
        if run.has_failed:
            err = run.error or error(
                Reason.INTERVENTION_RAISED, "the trace failed on another rank of the shard group"
            )
            err.trace_number = trace_number
            raise err
        self._state.handles.keep(outcome.kept)
        outliving = outcome.outliving
        self._state.keep(outliving)
        # What stays here may still be written to: the receiver gets memory of its own.
        saved = compact(outcome.saved)
        if outliving:
            saved = copied_together(saved)
        for node_id, value in sorted(saved.items()):
            operation = plan.nodes[node_id].operation
            name = operation.name if isinstance(operation, Save) else ""
            yield Saved(node_id, name, value)


class Between:
    """A computation or a log between traces."""

    def __init__(self, plan: Plan | None) -> None:
        """Makes it.

        Args:
            plan: the plan of a computation.
        """
        self.plan = plan
        self.window_step = (
            WindowStep(is_trace=False) if plan is None else Needs(plan).step(is_trace=False)
        )

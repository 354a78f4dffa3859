"""Runs a segment: the steps of a session on one model, strictly in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.engine.codec import StepDecoder
from insitu_shard.engine.events import Logged, Saved, SegmentEvent, TraceStarted
from insitu_shard.engine.graph import Call, Exit, Log, Save, Trace, operands, references, resolve
from insitu_shard.engine.inputs import model_inputs
from insitu_shard.engine.interleaver import Interleaver
from insitu_shard.engine.logs import format_values
from insitu_shard.engine.memory import compact, copied_together
from insitu_shard.engine.plan import plan_trace
from insitu_wire.errors import Reason, error
from insitu_wire.operations import is_in_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu_proto.v1 import shard_service_pb2
    from insitu_shard.engine.graph import NodeId, Step
    from insitu_shard.engine.model import LoadedModel


class SegmentRun:
    """One run of a segment. Every rank of a group makes one and runs the same steps in turn.

    Attributes:
        num_steps: how many steps there are.
        has_exited: whether session.exit was reached; no later step may be run.
    """

    def __init__(
        self,
        model: LoadedModel,
        segment: shard_service_pb2.Segment,
        values: dict[NodeId, object],
    ) -> None:
        """Decodes and prepares the steps.

        Args:
            model: the model to run them on.
            segment: the steps.
            values: the session's values that outlive a trace; read, added to, and freed at their
                last use.
        """
        decoder = StepDecoder(segment.locations, device=model.device)
        self._model = model
        self._values = values
        self._steps = [decoder.step(step) for step in segment.steps]
        self._used_later = _used_later(self._steps)
        self._writes_in_place = any(map(_has_in_place_call, self._steps))
        self._trace_number = segment.first_trace_number - 1
        self.num_steps = len(self._steps)
        self.has_exited = False

    def run_step(self, index: int) -> Iterator[SegmentEvent]:
        """Runs one step and yields what it tells.

        Raises:
            Error: the step failed; the events of what ran before it in the step are not lost.
        """
        step = self._steps[index]
        match step.kind:
            case Trace():
                self._trace_number += 1
                yield TraceStarted(self._trace_number)
                yield from self._run_trace(step.kind, self._used_later[index])
            case Log(values=logged):
                yield Logged(format_values(resolve(logged, self._values.__getitem__)))
            case Exit():
                self.has_exited = True
        for node_id in self._values.keys() - self._used_later[index]:
            del self._values[node_id]

    def _run_trace(self, trace: Trace, used_later: frozenset[NodeId]) -> Iterator[SegmentEvent]:
        plan = plan_trace(trace, used_later=used_later)
        inputs = model_inputs(
            trace.rows, pad_token_id=self._model.pad_token_id, device=self._model.device
        )
        interleaver = Interleaver(plan, self._model, self._values)
        interleaver.run(inputs)
        has_failed = self._model.ranks.any(interleaver.error is not None)
        for node_id in sorted(interleaver.logs):
            yield Logged(interleaver.logs[node_id])
        if has_failed:
            err = interleaver.error or error(
                Reason.INTERVENTION_RAISED, "the trace failed on another rank of the shard group"
            )
            err.trace_number = self._trace_number
            raise err
        beside = list(self._values.values()) if self._writes_in_place else None
        self._values.update(compact(interleaver.outliving, beside=beside))
        # What stays here may still be written to: the receiver gets memory of its own.
        saved = compact(interleaver.saved)
        if interleaver.outliving:
            saved = copied_together(saved)
        for node_id, value in sorted(saved.items()):
            operation = plan.nodes[node_id].operation
            name = operation.name if isinstance(operation, Save) else ""
            yield Saved(node_id, name, value)


def _has_in_place_call(step: Step) -> bool:
    nodes = step.kind.nodes if isinstance(step.kind, Trace) else ()
    operations = (node.operation for node in nodes)
    return any(isinstance(made, Call) and is_in_place(made.name) for made in operations)


def _used_later(steps: list[Step]) -> list[frozenset[NodeId]]:
    """Gives, for each step, the ids that steps after it refer to."""
    later: list[frozenset[NodeId]] = []
    used: frozenset[NodeId] = frozenset()
    for step in reversed(steps):
        later.append(used)
        used |= frozenset(_used_by(step))
    return later[::-1]


def _used_by(step: Step) -> Iterator[NodeId]:
    match step.kind:
        case Trace(nodes=nodes):
            for node in nodes:
                yield from references(list(operands(node.operation)))
        case Log(values=values):
            yield from references(list(values))

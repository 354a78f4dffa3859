"""Interventions that are recorded once and applied to many traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu._source import user_location
from insitu_proto.v1 import intervention_pb2, trace_pb2
from insitu_wire.errors import Location, Reason, error
from insitu_wire.steps import values_of
from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu._block_recorder import BlockRecorder
    from insitu._brought import BroughtTensors
    from insitu._recorder import SessionRecorder


@dataclass(frozen=True, slots=True)
class Edit:
    """The nodes of one edit, to be copied into traces."""

    trace: trace_pb2.Trace
    locations: Sequence[intervention_pb2.SourceLocation]
    brought: BroughtTensors

    @staticmethod
    def recorded_by(recorder: SessionRecorder) -> Edit:
        """Takes what was recorded in an edit's block.

        Raises:
            InvalidTraceError: MALFORMED_SESSION, if it saves a value.
        """
        if recorder.saved:
            raise error(
                Reason.MALFORMED_SESSION,
                "an edit is applied to many traces, so that it can not save a value; save it in "
                "the traces that it is applied to",
                location=user_location(),
            )
        trace = trace_pb2.Trace()
        for step in recorder.session.steps:
            trace.MergeFrom(step.trace)
        return Edit(trace, list(recorder.session.locations), recorder.brought)

    def apply(self, block: BlockRecorder, step: int = 0) -> None:
        """Copies the nodes into a trace, before anything else is recorded in it.

        Args:
            block: the trace.
            step: which step of it, if it generates.
        """
        assert block.trace is not None
        recorder = block.session_recorder
        new_ids: dict[int, int] = {}
        first_condition = len(block.trace.conditions)
        for condition in self.trace.conditions:
            copy = block.trace.conditions.add()
            copy.CopyFrom(condition)
            copy.parent += first_condition if copy.parent else 0
        for node in self.trace.nodes:
            copied = block.trace.nodes.add()
            copied.CopyFrom(node)
            copied.id = new_ids[node.id] = recorder.next_id()
            copied.condition += first_condition if copied.condition else 0
            _put_at(copied, step if block.max_new_tokens else None)
            if node.location:
                at = self.locations[node.location - 1]
                location = Location(at.file, at.line, at.source)
                copied.location = recorder.location_index(location)
        new_indices = recorder.brought.adopt(self.brought)
        _renumber(block.trace, new_ids, new_indices, first_condition)


def _put_at(node: intervention_pb2.Node, step: int | None) -> None:
    """Has a node belong to a step of a generation; to none where there are no steps."""
    if step is None:
        return
    node.step = step + 1
    match node.WhichOneof("operation"):
        case "read" | "write" as kind:
            getattr(node, kind).hook_point.step = step
        case "skip":
            node.skip.step = step


def _renumber(
    trace: trace_pb2.Trace, new_ids: dict[int, int], new_indices: list[int], first_condition: int
) -> None:
    """Has the copied nodes, the last of the trace, refer to each other, and to their tensors."""
    ours = trace.nodes[len(trace.nodes) - len(new_ids) :]
    conditions = [condition.value for condition in trace.conditions[first_condition:]]
    for value in (*conditions, *(value for node in ours for value in values_of(node))):
        for part in walk(value):
            if part.HasField("reference"):
                part.reference.node_id = new_ids.get(part.reference.node_id, part.reference.node_id)
            elif part.HasField("tensor_index"):
                part.tensor_index = new_indices[part.tensor_index]
    for node in ours:
        if node.HasField("assign"):
            node.assign.node_id = new_ids.get(node.assign.node_id, node.assign.node_id)

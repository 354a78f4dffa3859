"""What was recorded for one step of a generation, recorded again for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.steps import values_of
from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from insitu._block_recorder import BlockRecorder
    from insitu_proto.v1.intervention_pb2 import Node


class Body:
    """What is recorded from here on, for a step."""

    def __init__(self, block: BlockRecorder, step: int) -> None:
        assert block.trace is not None
        self._block = block
        self._trace = block.trace
        self._step = step
        self._first_node = len(block.trace.nodes)
        self._first_condition = len(block.trace.conditions)

    def repeat(self, steps: Iterable[int]) -> None:
        """Records the same for further steps."""
        nodes = list(self._trace.nodes[self._first_node :])
        conditions = list(self._trace.conditions[self._first_condition :])
        for step in steps:
            shift = len(self._trace.conditions) - self._first_condition
            new_ids: dict[int, int] = {}
            for condition in conditions:
                copy = self._trace.conditions.add()
                copy.CopyFrom(condition)
                copy.parent += shift if copy.parent > self._first_condition else 0
            copies = [self._copied(node, step, shift, new_ids) for node in nodes]
            added = self._trace.conditions[len(self._trace.conditions) - len(conditions) :]
            values = [condition.value for condition in added]
            for copied in copies:
                values.extend(values_of(copied))
                if copied.HasField("assign"):
                    target = copied.assign.node_id
                    copied.assign.node_id = new_ids.get(target, target)
            for part in (part for value in values for part in walk(value)):
                if part.HasField("reference"):
                    used = part.reference.node_id
                    part.reference.node_id = new_ids.get(used, used)

    def _copied(self, node: Node, step: int, shift: int, new_ids: dict[int, int]) -> Node:
        recorder = self._block.session_recorder
        copied = self._trace.nodes.add()
        copied.CopyFrom(node)
        copied.id = new_ids[node.id] = recorder.next_id()
        copied.condition += shift if copied.condition > self._first_condition else 0
        copied.step += step - self._step if copied.step else 0
        for kind in ("read", "write"):
            if copied.HasField(kind):
                getattr(copied, kind).hook_point.step += step - self._step
        if copied.HasField("skip"):
            copied.skip.step += step - self._step
        if copied.HasField("save"):
            recorder.saved[copied.id] = recorder.saved[node.id]
        return copied

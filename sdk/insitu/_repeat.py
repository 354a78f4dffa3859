"""What was recorded for one step of a generation, recorded again for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error
from insitu_wire.steps import values_of
from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insitu._block_recorder import BlockRecorder
    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_wire.errors import Location


class Body:
    """What is recorded from here on, for a step."""

    def __init__(self, block: BlockRecorder, step: int) -> None:
        assert block.trace is not None
        self._block = block
        self._trace = block.trace
        self._step = step
        self._first_node = len(block.trace.nodes)
        self._first_condition = len(block.trace.conditions)

    def repeat(self, steps: Sequence[int], location: Location) -> None:
        """Records the same for further steps.

        Args:
            steps: the steps.
            location: the user's line.

        Raises:
            InvalidTraceError: MALFORMED_SESSION if `.next()` in it goes beyond the last step.
        """
        nodes = list(self._trace.nodes[self._first_node :])
        self._check_reach(nodes, steps, location)
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

    def _check_reach(self, nodes: Sequence[Node], steps: Sequence[int], location: Location) -> None:
        reach = max((step for node in nodes for step in _steps_of(node)), default=0) - self._step
        num_steps = self._block.max_new_tokens
        if reach > 0 and max(steps, default=0) + reach >= num_steps:
            raise error(
                Reason.MALFORMED_SESSION,
                f"this block goes {reach} beyond its own steps, with .next(), and after step "
                f"{num_steps - 1} there is none (max_new_tokens={num_steps}); leave the last steps "
                f"out, as in tracer.iter[:{num_steps - reach}]",
                location=location,
                maxNewTokens=num_steps,
            )

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


def _steps_of(node: Node) -> Iterator[int]:
    for kind in ("read", "write"):
        if node.HasField(kind):
            yield getattr(node, kind).hook_point.step
    if node.HasField("skip"):
        yield node.skip.step

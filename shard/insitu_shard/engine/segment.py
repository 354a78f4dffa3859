"""Runs a segment: the steps of a session on one model, as if strictly in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.engine.codec import StepDecoder
from insitu_shard.engine.control import holds, items_of
from insitu_shard.engine.events import Saved, SegmentEvent, StepFollows
from insitu_shard.engine.graph import UNSET, Branch, Exit, Loop
from insitu_shard.engine.handles import KeptValues
from insitu_shard.engine.liveness import Liveness, has_in_place_call
from insitu_shard.engine.memory import copied_if_in, storages
from insitu_shard.engine.session_state import Options, SessionState
from insitu_shard.engine.window_run import WindowRun, windows
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from insitu_proto.v1 import shard_service_pb2
    from insitu_shard.compiler import Limits
    from insitu_shard.engine.graph import NodeId, Step
    from insitu_shard.engine.module import LoadedModule


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
        limits: Limits | None = None,
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
            limits: how large a pass may be.
        """
        # Computations between traces run where any of its models is.
        any_model = next(iter(models.values()))
        decoder = StepDecoder(
            segment.locations,
            tensors=tensors,
            device=any_model.device,
            first_trace_number=segment.first_trace_number,
        )
        self._steps = decoder.steps(segment.steps)
        self._state = SessionState(
            models=models,
            values=values,
            brought=storages(list(tensors)),
            handles=KeptValues(0) if handles is None else handles,
            liveness=Liveness(self._steps, kept),
            seed=segment.seed,
            options=_options(segment, limits),
            writes_in_place=bool(kept) or has_in_place_call(self._steps),
        )
        self._loops: list[NodeId] = []
        self._held: dict[NodeId, Saved] = {}
        self.has_exited = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants what it still does, and all ranks know."""
        return self._state.cancellation.is_agreed

    def cancel(self) -> None:
        """Has a pass that runs for it alone end at its next decoder layer. From any thread.

        Of several ranks one is told, and tells the others if the pass is a long one.
        """
        self._state.cancellation.is_asked = True
        if self._state.any_model.ranks.size == 1:
            self._state.cancellation.is_agreed = True

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
        for window in windows(steps):
            try:
                if isinstance(window[0].kind, Branch | Loop | Exit):
                    yield from self._run_flow(window[0])
                    self._state.free(self._state.liveness.used_after(window[0]))
                else:
                    yield from self._holding(WindowRun(window, self._state).run())
            except Error as err:
                err.location = err.location or window[0].location
                yield from self._release_held()
                raise

    def _run_flow(self, step: Step) -> Iterator[SegmentEvent | StepFollows]:
        match step.kind:
            case Branch(condition=condition, steps=steps, else_steps=else_steps):
                if (value := self._state.resolve(condition)) is not UNSET:
                    yield from self._run_steps(steps if holds(value) else else_steps)
            case Loop() as loop:
                yield from self._run_loop(loop)
            case Exit(loop=loop_id):
                raise _Leave(loop_id)

    def _run_loop(self, loop: Loop) -> Iterator[SegmentEvent | StepFollows]:
        # Items may be written to.
        items = copied_if_in(self._state.brought, self._state.resolve(loop.items))
        self._loops.append(loop.item_node_id)
        try:
            for item in () if items is UNSET else items_of(items):
                # What an item's steps do not set is not what those of the item before set.
                for node_id in self._state.liveness.defined_in(loop):
                    self._state.values.pop(node_id, None)
                self._state.values[loop.item_node_id] = item
                yield from self._run_steps(loop.steps)
        except _Leave as leave:
            if leave.loop != loop.item_node_id:
                raise
        finally:
            self._loops.pop()
        if not self._loops:
            yield from self._release_held()

    def _holding(
        self, events: Iterator[SegmentEvent | StepFollows]
    ) -> Iterator[SegmentEvent | StepFollows]:
        for event in events:
            if self._loops and isinstance(event, Saved):
                # A later item may save it again: the last one counts.
                self._held[event.node_id] = event
            else:
                yield event

    def _release_held(self) -> Iterator[Saved]:
        yield from self._held.values()
        self._held.clear()


def _options(segment: shard_service_pb2.Segment, limits: Limits | None) -> Options:
    options = {} if limits is None else {"limits": limits}
    return Options(
        is_exact=segment.exact,
        may_pad=segment.padding,
        checkpoints=segment.checkpoint,
        **options,
    )

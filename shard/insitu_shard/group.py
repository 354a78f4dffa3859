"""The ranks of a shard group in step: rank 0 leads, all run the same segments in one order."""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from insitu_proto.v1 import shard_service_pb2
from insitu_shard.engine import Finished, HandleStore, SegmentRun, StepFollows
from insitu_shard.engine.ranks import Ranks
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from insitu_shard.config import ShardConfig
    from insitu_shard.engine import LoadedModel, SegmentEvent

# Followers wait for the next command as long as nobody uses the model. A leader that dies closes
# its connections, which ends the wait at once.
_IDLE_TIMEOUT = timedelta(days=365)


class _Command(IntEnum):
    BEGIN_SEGMENT = 1
    RUN_STEP = 2
    RELEASE_SESSION = 3
    STOP = 4


class CommandChannel:
    """Carries commands from the leader to the followers, in one order."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._group = (
            dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT) if ranks.size > 1 else None
        )

    def send(self, command: _Command, payload: bytes = b"") -> None:
        """Sends a command to every follower. Leader only."""
        if self._group is None:
            return
        header = torch.tensor([command, len(payload)])
        dist.broadcast(header, src=0, group=self._group)
        if payload:
            body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            dist.broadcast(body, src=0, group=self._group)

    def receive(self) -> tuple[_Command, bytes]:
        """Waits for the leader's next command. Followers only."""
        header = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self._group)
        command, size = _Command(int(header[0])), int(header[1])
        body = torch.zeros(size, dtype=torch.uint8)
        if size:
            dist.broadcast(body, src=0, group=self._group)
        return command, body.numpy().tobytes()


def join_group(config: ShardConfig, rank: int) -> Ranks:
    """Joins the ranks that torchrun started; one rank alone joins nothing."""
    if config.num_ranks > 1:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(seconds=config.collective_timeout_seconds),
        )
    return Ranks(rank, config.num_ranks)


class Leader:
    """Runs segments on all ranks of the group. Used by one thread only."""

    def __init__(self, model: LoadedModel, channel: CommandChannel) -> None:
        self.model = model
        self.handles = HandleStore()
        self._channel = channel

    def run_segment(
        self,
        session_id: str,
        segment: shard_service_pb2.Segment,
        *,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[SegmentEvent]:
        """Runs a segment and yields what it tells.

        Args:
            session_id: session that owns the segment's values.
            segment: what to run.
            is_cancelled: asked before each step; once true, no further step runs and the events
                end without `Finished`.

        Raises:
            Error: a step failed.
        """
        request = shard_service_pb2.RunSegmentRequest(session_id=session_id, segment=segment)
        self._channel.send(_Command.BEGIN_SEGMENT, request.SerializeToString())
        run = _begin(self.model, request, self.handles)
        for event in run.run():
            if not isinstance(event, StepFollows):
                yield event
            elif is_cancelled():
                return
            else:
                self._channel.send(_Command.RUN_STEP)
        yield Finished(run.has_exited)

    def release(self, session_id: str) -> int:
        """Frees a session's values on every rank."""
        self._channel.send(_Command.RELEASE_SESSION, session_id.encode())
        return self.handles.release(session_id)

    def stop(self) -> None:
        """Ends the followers."""
        self._channel.send(_Command.STOP)


def follow(model: LoadedModel, channel: CommandChannel) -> None:
    """Does on this rank what the leader does, until it says stop."""
    handles = HandleStore()
    run: Iterator[SegmentEvent | StepFollows] = iter(())
    while True:
        command, payload = channel.receive()
        match command:
            case _Command.BEGIN_SEGMENT:
                request = shard_service_pb2.RunSegmentRequest.FromString(payload)
                run = _steps_of(model, request, handles)
                _run_to_next_step(run)
            case _Command.RUN_STEP:
                _run_to_next_step(run)
            case _Command.RELEASE_SESSION:
                handles.release(payload.decode())
            case _Command.STOP:
                return


def _begin(
    model: LoadedModel, request: shard_service_pb2.RunSegmentRequest, handles: HandleStore
) -> SegmentRun:
    values = handles.values(request.session_id)
    return SegmentRun({model.name: model}, request.segment, values)


def _steps_of(
    model: LoadedModel, request: shard_service_pb2.RunSegmentRequest, handles: HandleStore
) -> Iterator[SegmentEvent | StepFollows]:
    try:
        yield from _begin(model, request, handles).run()
    except Error:
        # The leader meets the same error, or the ranks agreed on it; it tells and sends no step.
        return


def _run_to_next_step(run: Iterator[SegmentEvent | StepFollows]) -> None:
    for event in run:
        if isinstance(event, StepFollows):
            return

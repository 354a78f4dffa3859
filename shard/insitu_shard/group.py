"""The ranks of a shard group in step: rank 0 leads, all run the same segments in one order."""

from __future__ import annotations

import struct
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from insitu_proto.v1 import shard_service_pb2
from insitu_shard.engine import Finished, HandleStore, SegmentRun
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
        run = SegmentRun(self.model, segment, self.handles.values(session_id))
        for index in range(run.num_steps):
            if is_cancelled():
                return
            if run.has_exited:
                break
            self._channel.send(_Command.RUN_STEP, struct.pack("<I", index))
            yield from run.run_step(index)
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
    run: SegmentRun | None = None
    while True:
        command, payload = channel.receive()
        match command:
            case _Command.BEGIN_SEGMENT:
                request = shard_service_pb2.RunSegmentRequest.FromString(payload)
                run = _begin(model, request, handles)
            case _Command.RUN_STEP if run is not None:
                _run_step(run, struct.unpack("<I", payload)[0])
            case _Command.RELEASE_SESSION:
                handles.release(payload.decode())
            case _Command.STOP:
                return


def _begin(
    model: LoadedModel, request: shard_service_pb2.RunSegmentRequest, handles: HandleStore
) -> SegmentRun | None:
    try:
        return SegmentRun(model, request.segment, handles.values(request.session_id))
    except Error:
        # The leader meets the same error, tells it, and sends no step.
        return None


def _run_step(run: SegmentRun, index: int) -> None:
    try:
        for _ in run.run_step(index):
            pass
    except Error:
        # The ranks agreed that the trace failed; the leader tells why.
        return

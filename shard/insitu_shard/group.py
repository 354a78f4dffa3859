"""The ranks of a shard group in step: rank 0 leads, all run the same segments in one order."""

from __future__ import annotations

import time
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from insitu_proto.v1 import shard_service_pb2
from insitu_proto.v1.tensor_pb2 import Tensor
from insitu_shard.engine import Finished, HandleStore, SegmentRun, StepFollows
from insitu_shard.engine.ranks import Ranks
from insitu_shard.imports import keep_values
from insitu_shard.lifetimes import Lifetimes
from insitu_shard.upload_cache import keep_upload, session_tensors
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from insitu_shard.config import ShardConfig
    from insitu_shard.engine import LoadedModel, SegmentEvent
from insitu_shard.upload_cache import UploadCache

# Followers wait for the next command as long as nobody uses the model. A leader that dies closes
# its connections, which ends the wait at once.
_IDLE_TIMEOUT = timedelta(days=365)

_BROADCAST_BYTES = 64 * 1024 * 1024


class _Command(IntEnum):
    BEGIN_SEGMENT = 1
    RUN_STEP = 2
    RELEASE_SESSION = 3
    STOP = 4
    STORE_UPLOAD = 5
    DROP_UPLOADS = 6
    STORE_VALUES = 7
    LET_GO = 8


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

    def send_data(self, data: bytearray) -> None:
        """Sends the bytes that a command has announced to every follower. Leader only."""
        self._broadcast(data)

    def receive_data(self, size: int) -> bytearray:
        """Waits for the bytes that a command has announced. Followers only."""
        data = bytearray(size)
        self._broadcast(data)
        return data

    def _broadcast(self, data: bytearray) -> None:
        if self._group is None or not data:
            return
        for part in torch.frombuffer(data, dtype=torch.uint8).split(_BROADCAST_BYTES):
            dist.broadcast(part, src=0, group=self._group)

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

    def __init__(
        self,
        model: LoadedModel,
        channel: CommandChannel,
        uploads: UploadCache,
        *,
        kept_bytes: int,
        kept_seconds: float,
    ) -> None:
        """Makes the leader.

        Args:
            model: the model.
            channel: reaches the followers.
            uploads: tensors that users brought.
            kept_bytes: how much each user may keep beyond sessions.
            kept_seconds: how long it is kept after its last use.
        """
        self.model = model
        self.uploads = uploads
        self.handles = HandleStore(kept_bytes)
        self._lifetimes = Lifetimes(kept_seconds)
        self._channel = channel

    def run_segment(
        self,
        request: shard_service_pb2.RunSegmentRequest,
        *,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[SegmentEvent]:
        """Runs a segment and yields what it tells.

        Args:
            request: what to run; its imports have been stored.
            is_cancelled: asked before each step; once true, no further step runs and the events
                end without `Finished`.

        Raises:
            Error: a step failed.
        """
        self.let_go_of_unused()
        self._lifetimes.touch(request, now=time.monotonic())
        self._channel.send(_Command.BEGIN_SEGMENT, request.SerializeToString())
        run = _begin(self.model, request, self.handles, self.uploads.tensors)
        for event in run.run():
            if not isinstance(event, StepFollows):
                yield event
            elif is_cancelled():
                return
            else:
                self._channel.send(_Command.RUN_STEP)
        yield Finished(run.has_exited)

    def values(self, session_id: str, node_ids: Iterable[int]) -> dict[int, object]:
        """Gives values of a session that are set."""
        values = self.handles.values(session_id)
        return {node_id: values[node_id] for node_id in node_ids if node_id in values}

    def store_values(
        self, imported: shard_service_pb2.ImportedValues, data: list[bytearray]
    ) -> None:
        """Keeps values of other groups on every rank, in place of what was kept under their ids."""
        self._channel.send(_Command.STORE_VALUES, imported.SerializeToString())
        for part in data:
            self._channel.send_data(part)
        keep_values(self.handles, imported, data, device=self.model.device)

    def store_upload(self, spec: Tensor, data: bytearray) -> None:
        """Keeps an uploaded tensor on every rank.

        Raises:
            CapacityError: OUT_OF_MEMORY.
        """
        if spec.content_hash in self.uploads.tensors:
            return
        if dropped := self.uploads.make_room(len(data)):
            self._channel.send(_Command.DROP_UPLOADS, "\n".join(dropped).encode())
        self._channel.send(_Command.STORE_UPLOAD, spec.SerializeToString())
        self._channel.send_data(data)
        model, uploads = self.model, self.uploads.tensors
        keep_upload(uploads, spec, data, device=model.device, ranks=model.ranks)

    def let_go(self, user: str, handle_id: str) -> bool:
        """Frees a kept value on every rank; tells whether there was one."""
        self._lifetimes.forget(user, handle_id)
        self._channel.send(_Command.LET_GO, f"{handle_id}\n{user}".encode())
        return self.handles.let_go(user, handle_id)

    def let_go_of_unused(self) -> None:
        """Frees kept values that have not been used for long."""
        for user, handle_id in self._lifetimes.expired(now=time.monotonic()):
            self.let_go(user, handle_id)

    def release(self, session_id: str) -> int:
        """Frees a session's values on every rank, and lets its uploads make room for others."""
        self.uploads.release(session_id)
        self._channel.send(_Command.RELEASE_SESSION, session_id.encode())
        return self.handles.release(session_id)

    def stop(self) -> None:
        """Ends the followers."""
        self._channel.send(_Command.STOP)


def follow(  # noqa: C901 - one case a command
    model: LoadedModel, channel: CommandChannel, *, kept_bytes: int
) -> None:
    """Does on this rank what the leader does, until it says stop."""
    handles = HandleStore(kept_bytes)
    uploads: dict[str, torch.Tensor] = {}
    run: Iterator[SegmentEvent | StepFollows] = iter(())
    while True:
        command, payload = channel.receive()
        match command:
            case _Command.BEGIN_SEGMENT:
                request = shard_service_pb2.RunSegmentRequest.FromString(payload)
                run = _steps_of(model, request, handles, uploads)
                _run_to_next_step(run)
            case _Command.RUN_STEP:
                _run_to_next_step(run)
            case _Command.RELEASE_SESSION:
                handles.release(payload.decode())
            case _Command.STORE_UPLOAD:
                _receive_upload(model, channel, uploads, Tensor.FromString(payload))
            case _Command.DROP_UPLOADS:
                for name in payload.decode().splitlines():
                    uploads.pop(name, None)
            case _Command.LET_GO:
                handle_id, _, user = payload.decode().partition("\n")
                handles.let_go(user, handle_id)
            case _Command.STORE_VALUES:
                imported = shard_service_pb2.ImportedValues.FromString(payload)
                data = [channel.receive_data(value.num_bytes) for value in imported.values]
                keep_values(handles, imported, data, device=model.device)
            case _Command.STOP:
                return


def _begin(
    model: LoadedModel,
    request: shard_service_pb2.RunSegmentRequest,
    handles: HandleStore,
    uploads: Mapping[str, torch.Tensor],
) -> SegmentRun:
    values = handles.values(request.session_id)
    tensors = session_tensors(request.segment.tensors, uploads, device=model.device)
    kept = request.kept_node_ids
    mine = handles.kept_for(request.user)
    return SegmentRun({model.name: model}, request.segment, values, tensors, kept, mine)


def _steps_of(
    model: LoadedModel,
    request: shard_service_pb2.RunSegmentRequest,
    handles: HandleStore,
    uploads: Mapping[str, torch.Tensor],
) -> Iterator[SegmentEvent | StepFollows]:
    try:
        yield from _begin(model, request, handles, uploads).run()
    except Error:
        # The leader meets the same error, or the ranks agreed on it; it tells and sends no step.
        return


def _run_to_next_step(run: Iterator[SegmentEvent | StepFollows]) -> None:
    for event in run:
        if isinstance(event, StepFollows):
            return


def _receive_upload(
    model: LoadedModel, channel: CommandChannel, uploads: dict[str, torch.Tensor], spec: Tensor
) -> None:
    data = channel.receive_data(num_bytes(spec))
    try:
        keep_upload(uploads, spec, data, device=model.device, ranks=model.ranks)
    except Error:
        # The ranks agreed that there is no room; the leader tells.
        return

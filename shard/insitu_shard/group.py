"""The ranks of a shard group in step: rank 0 leads, all run the same segments in one order."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_proto.v1 import shard_service_pb2
from insitu_proto.v1.tensor_pb2 import Tensor
from insitu_shard.command_channel import Command
from insitu_shard.engine import Finished, HandleStore, SegmentPool, SegmentRun, seen
from insitu_shard.imports import keep_values
from insitu_shard.lifetimes import Lifetimes
from insitu_shard.rank_report import RankReport, report_all
from insitu_shard.upload_cache import keep_upload, session_tensors
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from insitu_shard.command_channel import CommandChannel
    from insitu_shard.compiler import Limits
    from insitu_shard.engine import Budgets, LoadedModel, SegmentEvent
    from insitu_shard.engine.pool import PassReport
    from insitu_shard.upload_cache import UploadCache

# A rank that was killed is known to be gone soon after its connections are.
_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What a group is like."""

    ranks: list[RankReport]
    num_handles: int
    handle_bytes: int
    session_bytes: int
    kept_bytes: int
    """Of the user who keeps most."""
    upload_bytes: int


class Leader:
    """Runs segments beside each other on all ranks of the group. Used by one thread only."""

    def __init__(
        self,
        model: LoadedModel,
        channel: CommandChannel,
        uploads: UploadCache,
        *,
        budgets: Budgets,
        kept_seconds: float,
        limits: Limits,
    ) -> None:
        """Makes the leader.

        Args:
            model: the model.
            channel: reaches the followers.
            uploads: tensors that users brought.
            budgets: how much memory values may take.
            kept_seconds: how long it is kept after its last use.
            limits: how large a forward pass may be.
        """
        self.model = model
        self.uploads = uploads
        self.handles = HandleStore(budgets)
        self._lifetimes = Lifetimes(kept_seconds)
        self._channel = channel
        self._limits = limits
        self._pool = SegmentPool(limits)

    def watch_passes(self, on_pass: Callable[[PassReport], None]) -> None:
        """Has somebody told of each pass."""
        self._pool.on_pass = on_pass

    def begin(self, key: str, request: shard_service_pb2.RunSegmentRequest) -> None:
        """Adds a segment on every rank; it runs from the next round on.

        Args:
            key: names it; no other segment has had it.
            request: what to run; its imports have been stored.

        Raises:
            Error: it can not be run.
        """
        self.let_go_of_unused()
        self._lifetimes.begin(key, request, now=time.monotonic())
        payload = b"%s\n%s" % (key.encode(), request.SerializeToString())
        self._channel.send(Command.BEGIN_SEGMENT, payload)
        try:
            run = _read(self.model, request, self.handles, self.uploads.tensors, self._limits)
            self._pool.add(key, run, user=request.user)
        except Error:
            self._lifetimes.end(key)
            raise

    def cancel(self, key: str) -> None:
        """Has a segment that is about to be dropped leave the pass that runs. From any thread."""
        self._pool.cancel(key)

    def drop(self, key: str) -> None:
        """Ends a segment on every rank; nothing more of it is told."""
        self._channel.send(Command.DROP_SEGMENT, key.encode())
        self._pool.drop(key)
        self._lifetimes.end(key)

    def pause(self, key: str, *, goes_on: bool) -> None:
        """Holds a segment on every rank before its next trace, or lets it go on."""
        command = Command.RESUME_SEGMENT if goes_on else Command.PAUSE_SEGMENT
        self._channel.send(command, key.encode())
        self._pool.pause(key, goes_on=goes_on)

    @property
    def is_idle(self) -> bool:
        """Whether no segment could go on."""
        return self._pool.is_idle

    def round(self) -> Iterator[tuple[str, SegmentEvent | Error]]:
        """Runs one step of each segment on every rank.

        Yields:
            The segment's key, and what it tells; `Finished` or an error is the last.
        """
        self._channel.send(Command.RUN_ROUND)
        for key, event in self._pool.round():
            if isinstance(event, Finished | Error):
                self._lifetimes.end(key)
            yield key, event

    def values(self, session_id: str, node_ids: Iterable[int]) -> dict[int, object]:
        """Gives values of a session that are set."""
        values = self.handles.values(session_id)
        return {node_id: seen(values[node_id]) for node_id in node_ids if node_id in values}

    def store_values(
        self, imported: shard_service_pb2.ImportedValues, data: list[bytearray]
    ) -> None:
        """Keeps values of other groups on every rank, in place of what was kept under their ids."""
        self._channel.send(Command.STORE_VALUES, imported.SerializeToString())
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
            self._channel.send(Command.DROP_UPLOADS, "\n".join(dropped).encode())
        self._channel.send(Command.STORE_UPLOAD, spec.SerializeToString())
        self._channel.send_data(data)
        model, uploads = self.model, self.uploads.tensors
        keep_upload(uploads, spec, data, device=model.device, ranks=model.ranks)

    def let_go(self, user: str, handle_id: str) -> bool:
        """Frees a kept value on every rank; tells whether there was one.

        Segments that use it go on with it: it is freed after the last of them.
        """
        had_value = handle_id in self.handles.kept_for(user)
        if self._lifetimes.forget(user, handle_id):
            self._channel.send(Command.LET_GO, f"{handle_id}\n{user}".encode())
            self.handles.let_go(user, handle_id)
        return had_value

    def let_go_of_unused(self) -> None:
        """Frees kept values that have not been used for long."""
        for user, handle_id in self._lifetimes.expired(now=time.monotonic()):
            self.let_go(user, handle_id)

    def release(self, session_id: str) -> int:
        """Frees a session's values on every rank, and lets its uploads make room for others."""
        self.uploads.release(session_id)
        self._channel.send(Command.RELEASE_SESSION, session_id.encode())
        return self.handles.release(session_id)

    def release_all(self) -> None:
        """Frees the values of all sessions on every rank; segments that still run go on."""
        for session_id in self.handles.session_ids:
            self.release(session_id)

    def report(self) -> GroupReport:
        """Tells what the group is like now."""
        self._channel.send(Command.REPORT)
        return GroupReport(
            ranks=report_all(self.model),
            num_handles=self.handles.num_values,
            handle_bytes=self.handles.num_bytes,
            session_bytes=self.handles.session_bytes,
            kept_bytes=self.handles.largest_kept_bytes,
            upload_bytes=self.uploads.num_bytes,
        )

    def why_lost(self, exception: Exception) -> str:
        """Finds out why the group has to end in which something was raised that is no error."""
        return self.model.ranks.why_lost(exception, within_seconds=_WORDS_SECONDS)

    def stop(self) -> None:
        """Ends the followers."""
        self._channel.send(Command.STOP)


def follow(  # noqa: C901 - one case a command
    model: LoadedModel, channel: CommandChannel, *, budgets: Budgets, limits: Limits
) -> None:
    """Does on this rank what the leader does, until it says stop."""
    handles = HandleStore(budgets)
    uploads: dict[str, torch.Tensor] = {}
    pool = SegmentPool(limits)
    while True:
        command, payload = channel.receive()
        match command:
            case Command.BEGIN_SEGMENT:
                key, _, message = payload.partition(b"\n")
                request = shard_service_pb2.RunSegmentRequest.FromString(message)
                # The leader meets the same error, and tells.
                with suppress(Error):
                    run = _read(model, request, handles, uploads, limits)
                    pool.add(key.decode(), run, user=request.user)
            case Command.DROP_SEGMENT:
                pool.drop(payload.decode())
            case Command.PAUSE_SEGMENT | Command.RESUME_SEGMENT:
                pool.pause(payload.decode(), goes_on=command is Command.RESUME_SEGMENT)
            case Command.RUN_ROUND:
                # Errors, too, are the same on all ranks, or these agreed on them.
                for _ in pool.round():
                    pass
            case Command.RELEASE_SESSION:
                handles.release(payload.decode())
            case Command.STORE_UPLOAD:
                _receive_upload(model, channel, uploads, Tensor.FromString(payload))
            case Command.DROP_UPLOADS:
                for name in payload.decode().splitlines():
                    uploads.pop(name, None)
            case Command.LET_GO:
                handle_id, _, user = payload.decode().partition("\n")
                handles.let_go(user, handle_id)
            case Command.STORE_VALUES:
                imported = shard_service_pb2.ImportedValues.FromString(payload)
                data = [channel.receive_data(value.num_bytes) for value in imported.values]
                keep_values(handles, imported, data, device=model.device)
            case Command.REPORT:
                report_all(model)
            case Command.STOP:
                return


def _read(
    model: LoadedModel,
    request: shard_service_pb2.RunSegmentRequest,
    handles: HandleStore,
    uploads: Mapping[str, torch.Tensor],
    limits: Limits,
) -> SegmentRun:
    values = handles.values(request.session_id)
    values.bound(request.max_handle_bytes if request.HasField("max_handle_bytes") else None)
    tensors = session_tensors(request.segment.tensors, uploads, device=model.device)
    kept = request.kept_node_ids
    mine = handles.kept_for(request.user)
    mine.bound(request.max_kept_bytes if request.HasField("max_kept_bytes") else None)
    return SegmentRun(
        {model.name: model},
        request.segment,
        values,
        tensors,
        kept,
        mine,
        limits,
    )


def _receive_upload(
    model: LoadedModel, channel: CommandChannel, uploads: dict[str, torch.Tensor], spec: Tensor
) -> None:
    data = channel.receive_data(num_bytes(spec))
    try:
        keep_upload(uploads, spec, data, device=model.device, ranks=model.ranks)
    except Error:
        # The ranks agreed that there is no room; the leader tells.
        return

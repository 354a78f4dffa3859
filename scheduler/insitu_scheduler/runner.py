"""Runs one session on its shard groups, and passes on what happens."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, Segment
from insitu_scheduler import events
from insitu_scheduler.refusals import limit_exceeded
from insitu_scheduler.shards import replica_lost
from insitu_scheduler.terms import Terms
from insitu_scheduler.uploads import bring_uploads
from insitu_wire.error_codec import from_failure
from insitu_wire.errors import Error, Reason
from insitu_wire.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from google.protobuf.duration_pb2 import Duration

    from insitu_proto.v1.session_pb2 import Session
    from insitu_proto.v1.shard_service_pb2 import Import, RunSegmentResponse, SegmentFinished
    from insitu_scheduler.events import EventBook, EventLog
    from insitu_scheduler.places import SessionPlaces
    from insitu_scheduler.queue import SessionId
    from insitu_scheduler.results import ResultWriter
    from insitu_scheduler.run_clock import RunClock
    from insitu_scheduler.segments import SegmentRange
    from insitu_scheduler.shards import ShardClient
    from insitu_scheduler.transfers import Transfers
    from insitu_scheduler.uploads import UploadStore

_TRACING = Tracing("insitu-scheduler")
_ANNOUNCE_SECONDS = 1.0
_MAX_TRIES = 5
_RELEASE_SECONDS = 60.0


@dataclass(slots=True)
class SessionRun:
    """One session while it runs."""

    log: EventLog
    session: Session
    segments: list[SegmentRange]
    transfers: list[Transfers]
    num_traces: int
    book: EventBook
    writer: ResultWriter
    uploads: UploadStore
    clock: RunClock
    """Bounds how long it runs."""
    terms: Terms = field(default_factory=Terms)
    """What it may take while it runs, and whose span it is a part of."""
    has_started: bool = field(default=False, init=False)
    """Whether the first RUNNING event has been shown."""
    num_repeated: int = field(default=0, init=False)
    """How many messages and tokens come that an attempt before has shown."""
    shard_seconds: float | None = field(default=None, init=False)
    """What its segments took of their groups' time so far; None if that is not known."""
    span: str = field(default="", init=False)
    """Names the span of its run."""
    num_tokens: int = field(default=0, init=False)
    """How many have gone, or go now, through its models."""
    saved_bytes: int = field(default=0, init=False)
    """What it has saved so far."""
    announced_at: float | None = field(default=None, init=False)
    """When a trace was announced last, in seconds of the monotonic clock."""

    async def run(self, places: SessionPlaces) -> None:
        """Runs the segments in order, to the end or to session.exit().

        Args:
            places: at the groups that run it.

        Raises:
            Error: why the session failed. What it had saved before stays.
        """
        session_id = self.log.session_id
        accepted_at = self.log.events[0].time.ToNanoseconds()
        parent = self.terms.traceparent
        with _TRACING.span("insitu.queue", parent, start_ns=accepted_at, session_id=session_id):
            pass  # it ends here
        async with self.clock.running():
            with _TRACING.span("insitu.run", parent, session_id=session_id) as self.span:
                await self._run(places)

    async def _run(self, places: SessionPlaces) -> None:
        self.num_repeated = self.log.num_told
        try:
            if self.log.attempt > 1:
                await _release(self.log.session_id, places.clients)
            for segment, transfers in zip(self.segments, self.transfers, strict=True):
                await places.enter(segment.model)
                imports = [
                    places.clients[model].importing(node_ids)
                    for model, node_ids in transfers.imports.items()
                ]
                if await self._run_segment(places, segment, imports, transfers.kept):
                    return
        finally:
            await self.writer.close()

    async def _run_segment(
        self,
        places: SessionPlaces,
        segment: SegmentRange,
        imports: Sequence[Import],
        kept: Sequence[int],
    ) -> bool:
        """Runs a segment; gives whether session.exit() was reached."""
        message = Segment(
            steps=self.session.steps[segment.start : segment.stop],
            locations=self.session.locations,
            first_trace_number=segment.first_trace_number,
            seed=self.session.seed,
            exact=self.session.exact,
            padding=self.session.padding,
            checkpoint=self.session.checkpoint,
            tensors=self.session.tensors,
        )
        limits = self.terms.limits
        request = RunSegmentRequest(
            session_id=self.log.session_id,
            segment=message,
            imports=imports,
            kept_node_ids=kept,
            user=self.log.user,
            max_handle_bytes=limits.max_handle_bytes,
            max_kept_bytes=limits.max_kept_bytes,
            traceparent=self.span,
            may_batch=True,
        )
        num_tries, shard = 0, places.clients[places.here]
        while True:
            num_tries += 1
            await bring_uploads(shard, self.log.session_id, message.tensors, self.uploads)
            places.brought(tensor.content_hash for tensor in message.tensors)
            try:
                return await self._stream(places, request)
            except Error as err:
                # Nothing has run: sessions beside this one needed all the room for their uploads.
                if err.reason is not Reason.TENSOR_NOT_UPLOADED or num_tries == _MAX_TRIES:
                    raise

    async def _stream(self, places: SessionPlaces, request: RunSegmentRequest) -> bool:
        """Sends a segment and passes on what happens; gives whether it exited."""
        shard, before = places.clients[places.here], self.shard_seconds or 0.0
        async with aclosing(shard.run_segment(request)) as responses:
            async for response in responses:
                self._announce(response)
                if response.trace_started.HasField("execution_time"):
                    places.used(before + _seconds(response.trace_started.execution_time))
                if response.WhichOneof("kind") == "finished":
                    self.writer.check_complete()
                    self._add_up(response.finished)
                    return response.finished.has_exited
                await self._pass_on(response)
        raise replica_lost("it ended before the session did")

    async def _pass_on(self, response: RunSegmentResponse) -> None:
        match response.WhichOneof("kind"):
            case "trace_started":
                self._check_tokens(response.trace_started.num_tokens)
            case "log_line" | "tokens" if self.num_repeated:
                self.num_repeated -= 1
            case "tokens":
                self.book.publish(self.log, events.tokens_chosen(response.tokens))
            case "log_line":
                self.book.publish(self.log, events.logged(response.log_line.message))
            case "saved_value":
                self._check_saved(response.saved_value.num_bytes)
                await self.writer.begin(response.saved_value)
            case "data":
                await self.writer.write(response.data)
            case "failure":
                raise from_failure(response.failure)

    def _check_tokens(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        limit = self.terms.limits.max_tokens
        if limit is not None and self.num_tokens > limit:
            takes = f"takes {self.num_tokens:,} tokens or more through its models"
            raise limit_exceeded(takes, int(limit), "max_tokens")

    def _check_saved(self, num_bytes: int) -> None:
        self.saved_bytes += num_bytes
        limit = self.terms.limits.max_saved_bytes
        if limit is not None and self.saved_bytes > limit:
            saves = f"saves {self.saved_bytes:,} bytes or more"
            raise limit_exceeded(saves, int(limit), "max_saved_bytes")

    def _add_up(self, finished: SegmentFinished) -> None:
        if finished.HasField("execution_time"):
            self.shard_seconds = (self.shard_seconds or 0.0) + _seconds(finished.execution_time)

    def _announce(self, response: RunSegmentResponse) -> None:
        """Tells that the session runs, and, at most once a second, which trace starts."""
        if response.HasField("trace_started"):
            now = time.monotonic()
            if self.announced_at is None or now - self.announced_at >= _ANNOUNCE_SECONDS:
                self.announced_at = now
                self._show_running(response.trace_started.trace_number)
        elif not self.has_started:
            self._show_running(0)

    def _show_running(self, trace_number: int) -> None:
        self.has_started = True
        self.book.publish(self.log, events.running(trace_number, self.num_traces))


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()


async def _release(session_id: SessionId, shards: Mapping[str, ShardClient]) -> None:
    """Frees what an attempt before may have left where the scheduler that ran it died."""
    for shard in shards.values():
        await shard.release(session_id, timeout_seconds=_RELEASE_SECONDS)

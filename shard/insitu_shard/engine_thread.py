"""The one thread that runs the engine: rounds while there are segments, other work between them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from insitu_shard.downloads import finished_downloads
from insitu_shard.engine import Finished, TraceStarted
from insitu_shard.gathering import Gathering
from insitu_shard.told import Told
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future, ThreadPoolExecutor
    from typing import TypeVar

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest
    from insitu_shard.downloads import Downloads
    from insitu_shard.engine import SegmentEvent
    from insitu_shard.group import Leader
    from insitu_shard.metrics import ShardMetrics

    T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Segment:
    session_id: str
    user: str
    tell: Callable[[SegmentEvent | Error], None]
    started_at: float


class EngineThread:
    """Does what is asked for in the order of arrival, and rounds as long as nothing else waits.

    After a round all that has arrived meanwhile comes before the next: nothing waits for a whole
    segment to end. A round may wait a moment for segments that are about to come.
    """

    def __init__(
        self,
        leader: Leader,
        metrics: ShardMetrics,
        *,
        thread: ThreadPoolExecutor,
        downloads: Downloads,
        on_lost: Callable[[str], None],
        gathering: Gathering | None = None,
    ) -> None:
        """Makes it, on the event loop that will use it.

        Args:
            leader: runs segments on all ranks.
            metrics: where segments are counted.
            thread: the one thread that runs the engine.
            downloads: bring saved values into the host's memory.
            on_lost: called with the reason when the group can not go on.
            gathering: tells how long a round waits for more segments.
        """
        self._leader = leader
        self._metrics = metrics
        self._thread = thread
        self._downloads = downloads
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._keys = map(str, itertools.count(1))
        # One entry for each work that has been asked for and has not begun.
        self._waiting: deque[None] = deque()
        # From here on: the engine's thread only.
        self._segments: dict[str, _Segment] = {}
        self._is_round_due = False
        self._is_gathering = False
        self._gathering = gathering or Gathering()
        self._has_ended = False

    async def do(self, work: Callable[[], T]) -> T:
        """Does work between rounds, after what was asked for before.

        Raises:
            UnavailableError: REPLICA_LOST, if the group has ended.
        """
        # Ranks in step can not stop halfway when a caller goes away.
        return await asyncio.shield(asyncio.wrap_future(self._submit(work)))

    async def run(self, request: RunSegmentRequest) -> AsyncGenerator[list[SegmentEvent | Error]]:
        """Runs a segment beside others and yields what it tells, as much at once as there is.

        The last is `Finished` or an error. Whoever closes the generator before drops the segment.
        """
        key = next(self._keys)
        told = Told(self._loop)

        def tell(event: SegmentEvent | Error) -> None:
            told.put(self._downloads.begun(event))

        self._submit(partial(self._begin, key, request, tell))
        has_ended = False
        try:
            while not has_ended:
                async for events in finished_downloads(await told.take()):
                    has_ended = isinstance(events[-1], Finished | Error)
                    yield events
        finally:
            if not has_ended:
                self._leader.cancel(key)
                with suppress(Error):
                    await self.do(partial(self._drop, key))

    async def pause(self, session_id: str, *, goes_on: bool) -> None:
        """Holds a session's segments before their next traces, or lets them go on."""
        await self.do(partial(self._pause, session_id, goes_on))

    def stop(self) -> None:
        """Waits for what was asked for, and ends the followers."""
        self._submit(self._stop).result()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        self._waiting.append(None)
        return self._thread.submit(self._begin_work, work)

    def _begin_work(self, work: Callable[[], T]) -> T:
        self._waiting.popleft()
        # The ranks of a group that has ended wait for nothing any more.
        if self._has_ended:
            raise error(Reason.REPLICA_LOST, "the shard group has ended; submit the session again")
        try:
            return work()
        except Error:
            raise
        except Exception as exception:
            self._lose(exception)
            raise

    def _lose(self, exception: Exception) -> None:
        """Gives up the group on what no session can cause, such as a lost rank."""
        self._has_ended = True
        why = self._leader.why_lost(exception)
        _log.critical("the shard group is lost: %s", why, exc_info=exception)
        for segment in self._segments.values():
            segment.tell(
                error(
                    Reason.REPLICA_LOST,
                    f"the shard group that ran the session was lost: {why}; submit the session "
                    "again",
                    why=why,
                )
            )
        self._loop.call_soon_threadsafe(self._on_lost, why)

    def _begin(
        self,
        key: str,
        request: RunSegmentRequest,
        tell: Callable[[SegmentEvent | Error], None],
    ) -> None:
        self._segments[key] = _Segment(
            request.session_id, request.user, tell, started_at=time.monotonic()
        )
        self._metrics.segments_running(len(self._segments))
        try:
            self._leader.begin(key, request)
        except Error as err:
            self._tell(key, err)
        self._plan_round()

    def _drop(self, key: str) -> None:
        if key in self._segments:
            self._leader.drop(key)
            self._end(key, "cancelled")

    def _pause(self, session_id: str, goes_on: bool) -> None:
        for key, segment in self._segments.items():
            if segment.session_id == session_id:
                self._leader.pause(key, goes_on=goes_on)
        self._plan_round()

    def _stop(self) -> None:
        self._has_ended = True
        self._leader.stop()

    def _plan_round(self) -> None:
        if self._leader.is_idle or self._is_round_due:
            return
        seconds = self._gathering.seconds_left(self._users(), now=time.monotonic())
        if not seconds:
            self._is_round_due = True
            self._submit(self._round)
        elif not self._is_gathering:
            self._is_gathering = True
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._gathered)

    def _gathered(self) -> None:
        """Has the round begin, on the event loop: it has waited long enough."""
        if not self._has_ended:
            self._submit(self._end_gathering)

    def _end_gathering(self) -> None:
        self._is_gathering = False
        self._plan_round()

    def _round(self) -> None:
        self._is_round_due = False
        started = time.perf_counter()
        while not self._leader.is_idle:
            began, users = time.monotonic(), self._users()
            for key, event in self._leader.round():
                self._tell(key, event)
            if not self._segments:
                now = time.monotonic()
                self._gathering.ended(users, seconds=now - began, now=now)
            if self._waiting:
                break
        self._metrics.was_busy(time.perf_counter() - started)
        self._plan_round()

    def _users(self) -> list[str]:
        return [segment.user for segment in self._segments.values()]

    def _tell(self, key: str, event: SegmentEvent | Error) -> None:
        self._segments[key].tell(event)
        match event:
            case TraceStarted():
                self._metrics.trace_started()
            case Finished():
                self._end(key, "completed")
            case Error():
                self._end(key, "failed")

    def _end(self, key: str, outcome: str) -> None:
        seconds = time.monotonic() - self._segments.pop(key).started_at
        self._metrics.segment_ended(outcome, seconds)
        self._metrics.segments_running(len(self._segments))

"""Owns the queue and the groups, and brings sessions and groups with room together.

All state is touched from the event loop only, between two awaits: no locks.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from typing import TYPE_CHECKING

from insitu_proto.v1.event_pb2 import EventKind
from insitu_proto.v1.scheduler_service_pb2 import QueueState
from insitu_scheduler import events
from insitu_scheduler.attempts import check_attempts, was_lost, why_lost
from insitu_scheduler.background import Background
from insitu_scheduler.charging import Charging
from insitu_scheduler.deadlines import Deadlines
from insitu_scheduler.intake import Intake
from insitu_scheduler.kept_values import KeptValues
from insitu_scheduler.links import GroupLinks
from insitu_scheduler.live_session import LiveSession, ending
from insitu_scheduler.observing import Observer
from insitu_scheduler.placement import Placement
from insitu_scheduler.places import SessionPlaces
from insitu_scheduler.quantum import Quantum
from insitu_scheduler.refusals import deadline_exceeded
from insitu_scheduler.runner import SessionRun
from insitu_scheduler.segments import count_traces, cut
from insitu_scheduler.shards import replica_lost
from insitu_scheduler.transfers import plan_transfers
from insitu_scheduler.waiting_room import WaitingRoom
from insitu_scheduler.watchers import Watchers
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from insitu_proto.v1.event_pb2 import Event
    from insitu_scheduler.events import EventBook, EventLog
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.hosting import Hosting
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.models import ModelCatalog
    from insitu_scheduler.queue import SessionId, WaitingSession
    from insitu_scheduler.registry import Group, Registry
    from insitu_scheduler.results import ResultStore
    from insitu_scheduler.shards import ShardClient
    from insitu_scheduler.uploads import UploadStore

_log = logging.getLogger(__name__)

# Clients that lost the last scheduler have this long to find the next one.
_REUNION_SECONDS = 60.0
_STOP_SECONDS = 2.0


class Dispatcher:
    """The one owner of what waits and what runs."""

    def __init__(
        self,
        queue: FairQueue,
        registry: Registry,
        book: EventBook,
        results: ResultStore,
        uploads: UploadStore,
        metrics: SchedulerMetrics,
        hosting: Hosting,
        catalog: ModelCatalog,
        *,
        max_queued: int,
        max_attempts: int,
        orphan_grace_seconds: float,
        quantum_seconds: float,
    ) -> None:
        self.kept = KeptValues()
        self.watchers = Watchers(orphan_grace_seconds, self._cancel_orphan)
        self._deadlines = Deadlines(self._end_late)
        self._queue = queue
        self._registry = registry
        self._book = book
        self._results = results
        self._uploads = uploads
        self._metrics = metrics
        self.hosting = hosting
        self._max_attempts = max_attempts
        self._placement = Placement(registry)
        self._live: dict[SessionId, LiveSession] = {}
        self._links = GroupLinks(registry)
        self._background = Background()
        self.observer = Observer(queue, registry, self._live, metrics)
        self.intake = Intake(queue, max_queued=max_queued)
        self._charging = Charging(queue, self.observer, metrics, catalog.depths)
        self._room = WaitingRoom(
            queue, self.intake, self._charging, book, hosting, self.observer, metrics, self._live
        )
        self._quantum = Quantum(
            quantum_seconds,
            queue=queue,
            room=self._room,
            charging=self._charging,
            book=book,
            background=self._background,
            on_free=self._match,
        )

    def enqueue(
        self,
        live: LiveSession,
        *,
        position: int,
        is_detached: bool,
        grace_seconds: float | None = None,
    ) -> None:
        """Takes in a session that the journal has, shown to its user at a position."""
        if self.intake.is_stopping:
            # Its client is sent away as all others are; the next scheduler finds it in the journal.
            live.log.shut()
        self._live[live.log.session_id] = live
        self._book.add(live.log)
        if not is_detached:
            self.watchers.attach(live.log.session_id, grace_seconds)
        self._deadlines.start(live.log.session_id, live.terms.deadline)
        self._room.enter(live, position)
        self._match()

    def take_over(self, live: LiveSession, *, is_detached: bool) -> None:
        """Takes in a session that the last scheduler left unfinished.

        Raises:
            LeaseLostError: REPLICA_LOST, if it ran, and has been lost so too often.
        """
        state = live.log.state
        if state.kind == EventKind.EVENT_KIND_RUNNING:
            check_attempts(live.log.attempt, self._max_attempts)
            state = self._queued_again(live)
            self._book.publish(live.log, state)
        live.is_suspect = live.log.attempt > 1
        self.enqueue(
            live,
            position=state.queue_position,
            is_detached=is_detached,
            grace_seconds=_REUNION_SECONDS,
        )

    def _queued_again(self, live: LiveSession, why: str = "") -> Event:
        position = self._queue.num_ahead(live.model, live.log.user) + 1
        return events.queued_again(position, live.log.attempt + 1, why)

    async def cancel(self, session_id: SessionId) -> None:
        """Cancels a session: one that waits ends at once, one that runs before its next trace."""
        await self._end_early(session_id, events.cancelled())

    async def _end_early(self, session_id: SessionId, verdict: Event) -> None:
        live = self._live.get(session_id)
        if live is None:
            return
        if live.work is not None:
            live.ended_by = live.ended_by or verdict
            live.stop(verdict)
            return
        self._room.withdraw(live, _outcome(verdict))
        await asyncio.shield(self._background.spawn(self._end(live, verdict)))

    def join(self, group: Group, client: ShardClient) -> None:
        """Takes in a group that has just been granted its lease."""
        self._links.add(group, client)
        self.observer.groups_changed(group.model)
        self._match()

    def lose(self, group: Group, why: str) -> None:
        """Gives up a group whose lease is gone, and with it the sessions that it runs."""
        self.kept.lose(group.lease_id)
        self._fail_those_that_need(group, why)
        unneeded = self._links.remove(group)
        self.observer.groups_changed(group.model)
        for live in self._live.values():
            if group.lease_id in live.lease_ids:
                live.stop(events.failed(replica_lost(why)))
        if unneeded is not None:
            self._background.spawn(unneeded.close())

    async def release_kept(self, user: str, handle_id: str) -> bool:
        """Lets go of a value that a user keeps; tells whether there was one.

        Raises:
            PermissionDeniedError: PERMISSION_DENIED, if it is another user's.
        """
        place = self.kept.find(user, handle_id)
        self.kept.forget(user, handle_id)
        client = self._links.find(place.lease_id) if place else None
        return client is not None and await client.release_handle(user, handle_id)

    def _fail_those_that_need(self, group: Group, why: str) -> None:
        """Ends waiting sessions that load what a group kept that is gone."""
        for live in list(self._live.values()):
            if live.work is None and group.lease_id in live.needed_leases.values():
                self._room.withdraw(live, "error")
                self._background.spawn(self._end(live, events.failed(replica_lost(why))))

    def hosts_changed(self) -> None:
        """Takes note that a host has come, or has told what it does."""
        self._match()

    def heard(self, group: Group) -> None:
        """Takes note that a group has renewed its lease."""
        self.observer.groups_changed(group.model)
        self._match()

    def queue_state(self, model: str) -> QueueState:
        """Tells what waits for a model, and what runs on its groups."""
        now = self.observer.state(model)
        state = QueueState(model=model, num_waiting=now.num_waiting, num_running=now.num_running)
        state.backlog.FromTimedelta(datetime.timedelta(seconds=self._queue.backlog(model)))
        if now.num_waiting:
            state.oldest_age.FromTimedelta(datetime.timedelta(seconds=now.oldest_age_seconds))
        return state

    def drain(self, group: Group) -> None:
        """Sends a group nothing new; what it runs ends."""
        group.is_draining = True
        self.observer.groups_changed(group.model)

    async def stop(self, grace_seconds: float) -> None:
        """Gives what runs some time; what has not ended then is left to the next scheduler."""
        self.intake.is_stopping = True
        await self._background.settle(grace_seconds)
        for live in self._live.values():
            live.stop(events.put_back())
        await self._background.settle(_STOP_SECONDS)
        self._book.shut()
        await self._links.close()
        await self._background.settle(None)

    def _match(self) -> None:
        """Fills the free places of all groups with the next sessions that these can run."""
        started = time.perf_counter()
        while not self.intake.is_stopping and any(
            map(self._place_one, self._registry.ready_models())
        ):
            pass
        self._metrics.decided(time.perf_counter() - started)
        if not self.intake.is_stopping:
            self._room.review_hosts(self.kept)

    def _place_one(self, model: str) -> bool:
        """Starts one session on the groups of a model; False if none can start."""
        now = time.monotonic()
        found = self._queue.pop(
            model,
            lambda waiting: self._placement.groups_for(waiting, model, self._live.keys()),
            sated=self._placement.sated(model),
            now=now,
        )
        if found is None:
            return False
        waiting, groups = found
        live = self._live[waiting.session_id]
        self._room.called(waiting, model, now=now)
        self._charging.begin_turn(live, waiting)
        if live.work is None:
            self._start(live, waiting, groups)
        else:
            self._quantum.go_on(live)
        return True

    def _start(self, live: LiveSession, waiting: WaitingSession, groups: dict[str, Group]) -> None:
        segments = cut(live.session)
        run = SessionRun(
            log=live.log,
            session=live.session,
            segments=segments,
            transfers=plan_transfers(live.session, segments),
            num_traces=count_traces(live.session),
            book=self._book,
            writer=self._results.writer(live.log.session_id),
            uploads=self._uploads,
            clock=live.clock,
            terms=live.terms,
        )
        places = SessionPlaces(
            self._registry,
            self._links,
            waiting,
            groups,
            on_change=lambda group: self.observer.groups_changed(group.model),
            on_moved=self._match,
            on_used=lambda seconds: self._quantum.used(live, seconds),
        )
        live.places = places
        self.kept.add(live.log.user, live.session, places.leases, keeper=live.log.session_id)
        live.work = asyncio.create_task(run.run(places))
        self._background.spawn(self._see_through(live, run, places))

    async def _see_through(self, live: LiveSession, run: SessionRun, places: SessionPlaces) -> None:
        """Waits for a session's work, ends it, and has its groups take the next."""
        started = time.monotonic()
        event = await ending(live)
        seconds = time.monotonic() - started
        has_yielded = live.log.session_id in self._room
        if has_yielded:
            self._room.withdraw(live, _outcome(event))
        runs_again = self._runs_again(live, event)
        self._charging.end(live, run.shard_seconds)
        outcome = "interrupted" if runs_again else _outcome(event)
        self._metrics.executed(places.here, outcome, seconds)
        if was_lost(event):
            _log.warning("session %s is lost: %s", live.log.session_id, event.failure.message)
            places.suspect()
            live.is_suspect |= not has_yielded
            event = live.ended_by or event
        freeing = asyncio.create_task(self._release(live.log, places))
        if runs_again:
            await freeing
            await self._put_back(live, why_lost(event))
            return
        try:
            await self._end(live, event)
        finally:
            await freeing

    def _runs_again(self, live: LiveSession, event: Event) -> bool:
        """Whether a session is to be run again: not its own doing ended what ran it."""
        if event.kind == EventKind.EVENT_KIND_QUEUED:
            return True
        if live.ended_by is not None or not was_lost(event):
            return False
        return all(lease_id in self._registry for lease_id in live.needed_leases.values())

    async def _put_back(self, live: LiveSession, why: str) -> None:
        """Has a session wait again, after all that it left at groups was freed."""
        live.work, live.verdict, live.places, live.seconds = None, None, None, None
        if self.intake.is_stopping:
            self._book.publish(live.log, events.put_back())
            return
        if live.ended_by is not None:
            await self._end(live, live.ended_by)
            return
        try:
            check_attempts(live.log.attempt, self._max_attempts, why)
        except Error as err:
            await self._end(live, events.failed(err))
            return
        again = self._queued_again(live, why)
        self._book.publish(live.log, again)
        self._metrics.ran_again(live.model or "")
        self._room.enter(live, again.queue_position)
        self._match()

    async def _release(self, log: EventLog, places: SessionPlaces) -> None:
        try:
            await places.release(log)
        finally:
            self._match()

    async def _end(self, live: LiveSession, event: Event) -> None:
        self._live.pop(live.log.session_id, None)
        self.watchers.forget(live.log.session_id)
        self._deadlines.forget(live.log.session_id)
        self._uploads.release(live.log.session_id)
        if await self._book.end(live.log, event):
            self._metrics.finished(live.model or "", _outcome(event), live.log.age_seconds)

    def _cancel_orphan(self, session_id: SessionId) -> None:
        _log.info("session %s is cancelled: nobody watches it", session_id)
        self._background.spawn(self.cancel(session_id))

    def _end_late(self, session_id: SessionId) -> None:
        late = events.failed(deadline_exceeded())
        self._background.spawn(self._end_early(session_id, late))


def _outcome(event: Event) -> str:
    return events.kind_name(event).lower()

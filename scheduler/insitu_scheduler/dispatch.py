"""Owns the queue and the groups, and brings sessions and groups with room together.

All state is touched from the event loop only, between two awaits: no locks.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_proto.v1.event_pb2 import EventKind
from insitu_proto.v1.scheduler_service_pb2 import QueueState
from insitu_scheduler import events
from insitu_scheduler.attempts import check_attempts, was_lost
from insitu_scheduler.background import Background
from insitu_scheduler.cost_model import CostModel
from insitu_scheduler.kept_values import KeptValues
from insitu_scheduler.links import GroupLinks
from insitu_scheduler.live_session import LiveSession, ending
from insitu_scheduler.observing import Observer
from insitu_scheduler.placement import Placement
from insitu_scheduler.places import SessionPlaces
from insitu_scheduler.positions import PositionAnnouncer
from insitu_scheduler.queue import WaitingSession
from insitu_scheduler.refusals import queue_full, quota_exceeded
from insitu_scheduler.runner import SessionRun
from insitu_scheduler.segments import count_traces, cut, models_of, work_of
from insitu_scheduler.shards import replica_lost
from insitu_scheduler.transfers import plan_transfers
from insitu_scheduler.watchers import Watchers
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from insitu_proto.v1.event_pb2 import Event
    from insitu_scheduler.events import EventBook, EventLog
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.hosting import Hosting
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.queue import SessionId
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
        *,
        max_queued: int,
        max_attempts: int,
        orphan_grace_seconds: float,
        quantum_seconds: float,
    ) -> None:
        self.kept = KeptValues()
        self.watchers = Watchers(orphan_grace_seconds, self._cancel_orphan)
        self._queue = queue
        self._costs = CostModel()
        self._registry = registry
        self._book = book
        self._results = results
        self._uploads = uploads
        self._metrics = metrics
        self.hosting = hosting
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._quantum_seconds = quantum_seconds
        self._placement = Placement(registry)
        self._positions = PositionAnnouncer(queue, self._show_position)
        self._live: dict[SessionId, LiveSession] = {}
        self.observer = Observer(queue, registry, self._live, metrics)
        self._links = GroupLinks(registry)
        self._background = Background()
        self._num_reserved = 0
        self._num_of_user = Counter[str]()
        self._untold: set[SessionId] = set()
        self._is_stopping = False
        self.is_draining = False
        """Whether it takes no new sessions, by order of an administrator."""

    def check_open(self) -> None:
        """Refuses what is new once the scheduler stops.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        if self._is_stopping:
            raise events.shutting_down()

    def check_accepts(self) -> None:
        """Refuses new sessions once the scheduler stops or drains.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        self.check_open()
        if self.is_draining:
            raise error(
                Reason.SHUTTING_DOWN,
                "an administrator has the server take no new sessions; try again later",
            )

    def reserve(self, model: str | None, user: str, max_of_user: float | None = None) -> int:
        """Keeps a place for a session that is about to be accepted, and gives its position.

        Raises:
            CapacityError: QUEUE_FULL, or QUOTA_EXCEEDED if so many of the user wait already.
            UnavailableError: SHUTTING_DOWN.
        """
        self.check_accepts()
        if max_of_user is not None and self._num_of_user[user] >= max_of_user:
            raise quota_exceeded(int(max_of_user))
        if len(self._queue) + self._num_reserved >= self._max_queued:
            raise queue_full(self._max_queued)
        self._num_reserved += 1
        self._num_of_user[user] += 1
        return self._queue.num_ahead(model, user) + self._num_reserved

    def unreserve(self, user: str) -> None:
        """Gives a reserved place back, whether or not its session comes."""
        self._num_reserved -= 1
        self._count(user, -1)

    def enqueue(
        self,
        live: LiveSession,
        *,
        position: int,
        is_detached: bool,
        grace_seconds: float | None = None,
    ) -> None:
        """Takes in a session that the journal has, shown to its user at a position."""
        if self._is_stopping:
            # Its client is sent away as all others are; the next scheduler finds it in the journal.
            live.log.shut()
        self._live[live.log.session_id] = live
        self._book.add(live.log)
        if not is_detached:
            self.watchers.attach(live.log.session_id, grace_seconds)
        self._wait(live, position)
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
        self.enqueue(
            live,
            position=state.queue_position,
            is_detached=is_detached,
            grace_seconds=_REUNION_SECONDS,
        )

    def _queued_again(self, live: LiveSession) -> Event:
        position = self._queue.num_ahead(live.model, live.log.user) + 1
        return events.queued_again(position, live.log.attempt + 1)

    def _wait(self, live: LiveSession, position: int) -> None:
        """Has a session wait, shown to its user at a position."""
        live.expected_cost = self._costs.expect(live.model, work_of(live.session))
        # One of computations alone runs where what it loads is kept.
        model = live.model or next(iter(live.needed_leases), None)
        tensors = live.session.tensors
        waiting = WaitingSession(
            live.log.session_id,
            user=live.log.user,
            model=model,
            estimated_cost=live.expected_cost,
            enqueued_at=time.monotonic(),
            others=frozenset(models_of(live.session)) - {model},
            pins=live.needed_leases,
            after=live.keepers,
            is_alone=live.log.attempt > 1,
            tier=live.terms.tier,
            weight=live.terms.weight,
            uploads={at.content_hash: num_bytes(at) for at in tensors if at.content_hash},
        )
        self._push(waiting, position)

    def _push(self, waiting: WaitingSession, position: int, *, is_first: bool = False) -> None:
        self._queue.push(waiting, is_first=is_first)
        self._count(waiting.user, 1)
        self._positions.pushed(waiting.session_id, position)
        self._untold.add(waiting.session_id)
        self.observer.queue_changed(waiting)

    async def cancel(self, session_id: SessionId) -> None:
        """Cancels a session: one that waits ends at once, one that runs before its next trace."""
        live = self._live.get(session_id)
        if live is None:
            return
        if live.work is not None:
            live.is_cancelled = True
            live.stop(events.cancelled())
            return
        self._withdraw(live, "cancelled")
        await asyncio.shield(self._background.spawn(self._end(live, events.cancelled())))

    def join(self, group: Group, client: ShardClient) -> None:
        """Takes in a group that has just been granted its lease."""
        self._links.add(group, client)
        self.observer.groups_changed(group.model)
        self._match()

    def lose(self, group: Group) -> None:
        """Gives up a group whose lease is gone, and with it the sessions that it runs."""
        self.kept.lose(group.lease_id)
        self._fail_those_that_need(group)
        unneeded = self._links.remove(group)
        self.observer.groups_changed(group.model)
        for live in self._live.values():
            if group.lease_id in live.lease_ids:
                live.stop(events.failed(replica_lost()))
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

    def _fail_those_that_need(self, group: Group) -> None:
        """Ends waiting sessions that load what a group kept that is gone."""
        for live in list(self._live.values()):
            if live.work is None and group.lease_id in live.needed_leases.values():
                self._withdraw(live, "error")
                self._background.spawn(self._end(live, events.failed(replica_lost())))

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
        self._is_stopping = True
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
        while not self._is_stopping and any(map(self._place_one, self._registry.ready_models())):
            pass
        self._metrics.decided(time.perf_counter() - started)
        if not self._is_stopping:
            self._review_hosts()

    def _review_hosts(self) -> None:
        """Has hosts load what is asked for, and tells those who wait for it."""
        concerned = self._untold & self._live.keys()
        self._untold.clear()
        for model in self.hosting.review(self.kept, time.monotonic()):
            concerned.update(waiting.session_id for waiting in self._queue.waiting_for(model))
        for session_id in concerned:
            live = self._live[session_id]
            if live.work is None and self.hosting.text(models_of(live.session)):
                self._show_position(session_id, self._positions.shown(session_id))

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
        self._metrics.waited(model, "dispatched", now - waiting.enqueued_at)
        self._positions.left(waiting.session_id)
        self._count(waiting.user, -1)
        self.observer.queue_changed(waiting)
        live.turn, live.turn_began_at = waiting, live.seconds or 0.0
        if live.work is None:
            self._start(live, waiting, groups)
        elif live.places is not None:
            live.places.come_back()
            self._book.publish(live.log, events.running(0, count_traces(live.session)))
            self._pause(live, goes_on=True)
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
            terms=live.terms,
        )
        places = SessionPlaces(
            self._registry,
            self._links,
            waiting,
            groups,
            on_change=lambda group: self.observer.groups_changed(group.model),
            on_moved=self._match,
            on_used=lambda seconds: self._used(live, seconds),
        )
        live.places = places
        self.kept.add(live.log.user, live.session, places.leases, keeper=live.log.session_id)
        live.work = asyncio.create_task(run.run(places))
        self._background.spawn(self._see_through(live, run, places))

    def _used(self, live: LiveSession, seconds: float) -> None:
        """Has a session yield its place that has had its quantum, if others wait for it."""
        live.seconds = seconds
        turn, places = live.turn, live.places
        if turn is None or places is None or turn.is_alone:
            return
        spent = seconds - live.turn_began_at
        is_over = spent >= self._quantum_seconds
        if is_over and self._queue.has_others(places.here, live.log.user):
            self._yield(live, turn, places, spent)

    def _yield(
        self, live: LiveSession, turn: WaitingSession, places: SessionPlaces, spent: float
    ) -> None:
        self._queue.settle(turn, spent)
        self.observer.served(turn, seconds=spent)
        live.turn = None
        places.leave()
        again = replace(
            turn,
            model=places.here,
            others=frozenset(places.leases) - {places.here},
            pins=places.leases,
            estimated_cost=self._quantum_seconds,
            enqueued_at=time.monotonic(),
            has_begun=True,
        )
        self._push(again, 1, is_first=True)
        self._match()
        if live.log.session_id in self._queue:
            position = self._queue.num_ahead(again.model, again.user, again.tier, again.weight)
            self._book.publish(live.log, events.yielded(max(position, 1), self._quantum_seconds))
            self._pause(live, goes_on=False)

    def _pause(self, live: LiveSession, *, goes_on: bool) -> None:
        """Has a session's group hold it, or go on with it, after what it was told before."""
        before, places = live.pausing, live.places
        assert places is not None
        client = places.clients[places.here]

        async def tell() -> None:
            if before is not None:
                await asyncio.wait([before])
            # A group that is gone holds nothing.
            with suppress(Error):
                await client.pause(live.log.session_id, goes_on=goes_on)

        live.pausing = self._background.spawn(tell())

    async def _see_through(self, live: LiveSession, run: SessionRun, places: SessionPlaces) -> None:
        """Waits for a session's work, ends it, and has its groups take the next."""
        started = time.monotonic()
        event = await ending(live)
        seconds = time.monotonic() - started
        if live.log.session_id in self._queue:
            self._withdraw(live, _outcome(event))
        runs_again = self._runs_again(live, event)
        self._settle_cost(live, run.shard_seconds)
        outcome = "interrupted" if runs_again else _outcome(event)
        self._metrics.executed(places.here, outcome, seconds)
        if was_lost(event):
            _log.warning("session %s is lost: %s", live.log.session_id, event.failure.message)
            places.suspect()
        freeing = asyncio.create_task(self._release(live.log, places))
        if runs_again:
            await freeing
            await self._put_back(live)
            return
        try:
            await self._end(live, event)
        finally:
            await freeing

    def _runs_again(self, live: LiveSession, event: Event) -> bool:
        """Whether a session is to be run again: not its own doing ended what ran it."""
        if event.kind == EventKind.EVENT_KIND_QUEUED:
            return True
        if live.is_cancelled or not was_lost(event):
            return False
        return all(lease_id in self._registry for lease_id in live.needed_leases.values())

    async def _put_back(self, live: LiveSession) -> None:
        """Has a session wait again, after all that it left at groups was freed."""
        live.work, live.verdict, live.places, live.seconds = None, None, None, None
        if self._is_stopping:
            self._book.publish(live.log, events.put_back())
            return
        if live.is_cancelled:
            await self._end(live, events.cancelled())
            return
        try:
            check_attempts(live.log.attempt, self._max_attempts)
        except Error as err:
            await self._end(live, events.failed(err))
            return
        again = self._queued_again(live)
        self._book.publish(live.log, again)
        self._metrics.ran_again(live.model or "")
        self._wait(live, again.queue_position)
        self._match()

    def _settle_cost(self, live: LiveSession, seconds: float | None) -> None:
        """Charges the user what the session did cost; what it was expected to, if not known."""
        total = seconds if seconds is not None else live.seconds
        turn, live.turn = live.turn, None
        if turn is not None:
            known = None if total is None else max(total - live.turn_began_at, 0.0)
            cost = turn.estimated_cost if known is None else known
            self._queue.settle(turn, cost)
            self.observer.served(turn, seconds=cost)
            self._metrics.charged(turn.model or "", expected=turn.estimated_cost, seconds=cost)
        models = models_of(live.session)
        if seconds is not None and len(models) <= 1:
            self._costs.learn(live.model, work_of(live.session), seconds)

    async def _release(self, log: EventLog, places: SessionPlaces) -> None:
        try:
            await places.release(log)
        finally:
            self._match()

    async def _end(self, live: LiveSession, event: Event) -> None:
        self._live.pop(live.log.session_id, None)
        self.watchers.forget(live.log.session_id)
        self._uploads.release(live.log.session_id)
        if await self._book.end(live.log, event):
            self._metrics.finished(live.model or "", _outcome(event), live.log.age_seconds)

    def _withdraw(self, live: LiveSession, outcome: str) -> None:
        waiting = self._queue.remove(live.log.session_id)
        self._positions.left(live.log.session_id)
        if waiting is not None:
            self._count(waiting.user, -1)
            seconds = time.monotonic() - waiting.enqueued_at
            self._metrics.waited(live.model or "", outcome, seconds)
            self.observer.queue_changed(waiting)

    def _count(self, user: str, change: int) -> None:
        """Counts the sessions of a user that wait, or are about to."""
        self._num_of_user[user] += change
        if not self._num_of_user[user]:
            del self._num_of_user[user]

    def _cancel_orphan(self, session_id: SessionId) -> None:
        _log.info("session %s is cancelled: nobody watches it", session_id)
        self._background.spawn(self.cancel(session_id))

    def _show_position(self, session_id: SessionId, position: int) -> None:
        live = self._live[session_id]
        waits_for = self.hosting.text(models_of(live.session))
        self._book.publish(live.log, events.queued(position, waits_for))


def _outcome(event: Event) -> str:
    return events.kind_name(event).lower()

"""Owns the queue and the groups, and brings sessions and groups with room together.

All state is touched from the event loop only, between two awaits: no locks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from insitu_scheduler import events
from insitu_scheduler.cost_model import CostModel
from insitu_scheduler.kept_values import KeptValues
from insitu_scheduler.live_session import LiveSession, ending
from insitu_scheduler.positions import PositionAnnouncer
from insitu_scheduler.queue import WaitingSession
from insitu_scheduler.runner import SessionRun
from insitu_scheduler.segments import count_traces, cut, models_of, work_of
from insitu_scheduler.shards import replica_lost
from insitu_scheduler.transfers import plan_transfers
from insitu_scheduler.watchers import Watchers
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from insitu_proto.v1.event_pb2 import Event
    from insitu_scheduler.events import EventBook, EventLog
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.queue import SessionId
    from insitu_scheduler.registry import Group, LeaseId, Registry
    from insitu_scheduler.results import ResultStore
    from insitu_scheduler.shards import ShardClient
    from insitu_scheduler.uploads import UploadStore

_log = logging.getLogger(__name__)

_RELEASE_SECONDS = 60.0
# From a group that is lost, or when the scheduler stops.
_QUICK_RELEASE_SECONDS = 2.0


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
        *,
        max_queued: int,
        orphan_grace_seconds: float,
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
        self._max_queued = max_queued
        self._positions = PositionAnnouncer(queue, self._show_position)
        self._live: dict[SessionId, LiveSession] = {}
        self._clients: dict[LeaseId, ShardClient] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._num_reserved = 0
        self._is_stopping = False

    def check_open(self) -> None:
        """Refuses what is new once the scheduler stops.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        if self._is_stopping:
            raise _shutting_down()

    def reserve(self, model: str | None, user: str) -> int:
        """Keeps a place for a session that is about to be accepted, and gives its position.

        Raises:
            CapacityError: QUEUE_FULL.
            UnavailableError: SHUTTING_DOWN.
        """
        self.check_open()
        if len(self._queue) + self._num_reserved >= self._max_queued:
            raise error(
                Reason.QUEUE_FULL,
                f"{self._max_queued:,} sessions wait already, and the queue takes no more; "
                "try again later",
                maxQueuedSessions=self._max_queued,
            )
        self._num_reserved += 1
        return self._queue.num_ahead(model, user) + self._num_reserved

    def unreserve(self) -> None:
        """Gives a reserved place back, whether or not its session comes."""
        self._num_reserved -= 1

    def enqueue(self, live: LiveSession, *, position: int, is_detached: bool) -> None:
        """Takes in a session that the journal has, shown to its user at a position."""
        session_id = live.log.session_id
        self._live[session_id] = live
        self._book.add(live.log)
        if self._is_stopping:
            self._spawn(self._end(live, events.failed(_shutting_down())))
            return
        if not is_detached:
            self.watchers.attach(session_id)
        waiting = WaitingSession(
            session_id,
            user=live.log.user,
            model=live.model,
            estimated_cost=self._costs.expect(live.model, work_of(live.session)),
            enqueued_at=time.monotonic(),
            others=frozenset(models_of(live.session)) - {live.model},
            lease_id=live.needed_lease_id,
            after=live.keepers,
        )
        self._queue.push(waiting)
        self._positions.pushed(session_id, position)
        self._queue_changed(waiting)
        self._match()

    async def cancel(self, session_id: SessionId) -> None:
        """Cancels a session: one that waits ends at once, one that runs before its next trace."""
        live = self._live.get(session_id)
        if live is None:
            return
        if live.work is not None:
            live.stop(events.cancelled())
            return
        self._withdraw(live)
        await asyncio.shield(self._spawn(self._end(live, events.cancelled())))

    def join(self, group: Group, client: ShardClient) -> None:
        """Takes in a group that has just been granted its lease."""
        self._clients[group.lease_id] = client
        self.groups_changed(group.model)
        self._match()

    def lose(self, group: Group) -> None:
        """Gives up a group whose lease is gone, and with it the sessions that it runs."""
        self.kept.lose(group.lease_id)
        self._fail_those_that_need(group)
        client = self._clients.pop(group.lease_id, None)
        if client is None:
            return  # the scheduler stops, and has closed it
        self.groups_changed(group.model)
        for live in self._live.values():
            if group.lease_id in live.lease_ids:
                live.stop(events.failed(replica_lost()))
        # The last of its sessions closes the connection, after all have released their values.
        if not group.num_sessions:
            self._spawn(client.close())

    async def release_kept(self, user: str, handle_id: str) -> bool:
        """Lets go of a value that a user keeps; tells whether there was one."""
        place = self.kept.find(user, handle_id)
        self.kept.forget(user, handle_id)
        client = self._clients.get(place.lease_id) if place else None
        return client is not None and await client.release_handle(user, handle_id)

    def _fail_those_that_need(self, group: Group) -> None:
        """Ends waiting sessions that load what a group kept that is gone."""
        for live in list(self._live.values()):
            if live.work is None and live.needed_lease_id == group.lease_id:
                self._withdraw(live)
                self._spawn(self._end(live, events.failed(replica_lost())))

    def groups_changed(self, model: str) -> None:
        """Takes note that groups of a model came, went, or changed their state."""
        ready = sum(group.model == model for group in self._registry.ready())
        self._metrics.groups_changed(model, ready)

    def count(self, model: str) -> tuple[int, int]:
        """Counts the sessions that wait and that run on a model's groups."""
        leases = {group.lease_id for group in self._registry if group.model == model}
        running = sum(bool(live.lease_ids & leases) for live in self._live.values())
        return self._queue.num_waiting(model), running

    async def stop(self, grace_seconds: float) -> None:
        """Ends what waits, gives what runs some time, and ends that too."""
        self._is_stopping = True
        for live in list(self._live.values()):
            if live.work is None:
                self._withdraw(live)
                self._spawn(self._end(live, events.failed(_shutting_down())))
        await self._settle(grace_seconds)
        for live in self._live.values():
            live.stop(events.failed(_shutting_down()))
        await self._settle(_QUICK_RELEASE_SECONDS)
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()
        await self._settle(None)

    def _match(self) -> None:
        """Fills the free places of all groups with the next sessions that these can run."""
        while not self._is_stopping and self._place_one():
            pass

    def _place_one(self) -> bool:
        """Starts one session, where there are the most free places; False if none can start."""
        ready = self._registry.ready()
        free = {group.model: group for group in reversed(ready)}
        for group in ready:
            now = time.monotonic()
            waiting = self._queue.pop(
                group.model,
                free.keys(),
                group.lease_id,
                live=self._live.keys(),
                sated=group.sated_users,
                now=now,
            )
            if waiting is not None:
                needed = ({waiting.model} | waiting.others) - {group.model, None}
                groups = [group, *(free[model] for model in needed if model)]
                for taken in groups:
                    self._registry.take(taken, waiting.user)
                    self.groups_changed(taken.model)
                self._metrics.dispatched(group.model, now - waiting.enqueued_at)
                self._positions.left(waiting.session_id)
                self._queue_changed(waiting)
                self._start(self._live[waiting.session_id], waiting, groups)
                return True
        return False

    def _start(self, live: LiveSession, waiting: WaitingSession, groups: list[Group]) -> None:
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
        )
        held = [(group, self._clients[group.lease_id]) for group in groups]
        leases = {group.model: group.lease_id for group in groups}
        self.kept.add(live.log.user, live.session, leases, keeper=live.log.session_id)
        live.lease_ids = frozenset(group.lease_id for group in groups)
        live.work = asyncio.create_task(run.run({group.model: client for group, client in held}))
        self._spawn(self._see_through(live, waiting, run, held))

    async def _see_through(
        self,
        live: LiveSession,
        waiting: WaitingSession,
        run: SessionRun,
        held: list[tuple[Group, ShardClient]],
    ) -> None:
        """Waits for a session's work, ends it, and has its groups take the next."""
        started = time.monotonic()
        event = await ending(live)
        seconds = time.monotonic() - started
        self._settle_cost(live, waiting, run.shard_seconds)
        self._metrics.executed(held[0][0].model, _outcome(event), seconds)
        freeing = [
            asyncio.create_task(self._release(live.log, group, client)) for group, client in held
        ]
        try:
            await self._end(live, event)
        finally:
            await asyncio.gather(*freeing)

    def _settle_cost(
        self, live: LiveSession, waiting: WaitingSession, seconds: float | None
    ) -> None:
        """Charges the user what the session did cost; what it was expected to, if not known."""
        cost = waiting.estimated_cost if seconds is None else seconds
        self._queue.settle(waiting, cost)
        if seconds is not None and not waiting.others:
            self._costs.learn(waiting.model, work_of(live.session), seconds)

    async def _release(self, log: EventLog, group: Group, client: ShardClient) -> None:
        is_held = group.lease_id in self._registry and not self._is_stopping
        timeout_seconds = _RELEASE_SECONDS if is_held else _QUICK_RELEASE_SECONDS
        try:
            await client.release(log.session_id, timeout_seconds=timeout_seconds)
        finally:
            await self._free(group, log.user, client)

    async def _free(self, group: Group, user: str, client: ShardClient) -> None:
        self._registry.free(group, user)
        if group.lease_id in self._registry:
            self.groups_changed(group.model)
            self._match()
        elif not group.num_sessions:
            await client.close()

    async def _end(self, live: LiveSession, event: Event) -> None:
        self._live.pop(live.log.session_id, None)
        self.watchers.forget(live.log.session_id)
        self._uploads.release(live.log.session_id)
        if await self._book.end(live.log, event):
            self._metrics.finished(live.model or "", _outcome(event))

    def _withdraw(self, live: LiveSession) -> None:
        waiting = self._queue.remove(live.log.session_id)
        self._positions.left(live.log.session_id)
        if waiting is not None:
            self._queue_changed(waiting)

    def _cancel_orphan(self, session_id: SessionId) -> None:
        _log.info("session %s is cancelled: nobody watches it", session_id)
        self._spawn(self.cancel(session_id))

    def _show_position(self, session_id: SessionId, position: int) -> None:
        self._book.publish(self._live[session_id].log, events.queued(position))

    def _queue_changed(self, waiting: WaitingSession) -> None:
        for model in waiting.models:
            oldest = self._queue.oldest(model)
            self._metrics.queue_changed(
                model or "", self._queue.num_waiting(model), oldest.enqueued_at if oldest else None
            )

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (exception := task.exception()) is not None:
            _log.critical("the dispatcher met a flaw", exc_info=exception)

    async def _settle(self, timeout_seconds: float | None) -> None:
        if self._background:
            await asyncio.wait(self._background, timeout=timeout_seconds)


def _outcome(event: Event) -> str:
    return events.kind_name(event).lower()


def _shutting_down() -> Error:
    return error(
        Reason.SHUTTING_DOWN,
        "the server is stopping; try again once it is back",
    )

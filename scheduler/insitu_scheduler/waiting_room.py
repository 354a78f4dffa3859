"""Sessions that wait: in the queue, counted, and told where they are in it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from insitu_scheduler import events
from insitu_scheduler.positions import PositionAnnouncer
from insitu_scheduler.queue import WaitingSession
from insitu_scheduler.segments import models_of
from insitu_wire.dtypes import num_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from insitu_scheduler.charging import Charging
    from insitu_scheduler.events import EventBook
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.hosting import Hosting
    from insitu_scheduler.intake import Intake
    from insitu_scheduler.kept_values import KeptValues
    from insitu_scheduler.live_session import LiveSession
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.observing import Observer
    from insitu_scheduler.queue import SessionId


class WaitingRoom:
    """Has sessions wait and leave, and sees to all who are to know."""

    def __init__(
        self,
        queue: FairQueue,
        intake: Intake,
        charging: Charging,
        book: EventBook,
        hosting: Hosting,
        observer: Observer,
        metrics: SchedulerMetrics,
        live: Mapping[SessionId, LiveSession],
    ) -> None:
        self._queue = queue
        self._intake = intake
        self._charging = charging
        self._book = book
        self._hosting = hosting
        self._observer = observer
        self._metrics = metrics
        self._live = live
        self._positions = PositionAnnouncer(queue, self._show_position)
        self._untold: set[SessionId] = set()

    def __contains__(self, session_id: object) -> bool:
        """Whether a session waits."""
        return session_id in self._queue

    def enter(self, live: LiveSession, position: int) -> None:
        """Has a session wait that has nothing at any group, shown to its user at a position."""
        self._charging.expect(live)
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
            is_alone=live.is_suspect,
            tier=live.terms.tier,
            weight=live.terms.weight,
            uploads={at.content_hash: num_bytes(at) for at in tensors if at.content_hash},
            handle_bytes=int(live.terms.limits.max_handle_bytes or 0),
        )
        self.push(waiting, position)

    def push(self, waiting: WaitingSession, position: int, *, is_first: bool = False) -> None:
        """Has a session wait behind its user's own, or before them."""
        self._queue.push(waiting, is_first=is_first)
        self._intake.count(waiting.user, 1)
        self._positions.pushed(waiting.session_id, position)
        self._untold.add(waiting.session_id)
        self._observer.queue_changed(waiting)

    def called(self, waiting: WaitingSession, model: str, *, now: float) -> None:
        """Takes note that a session was taken out of the queue to run on a model's group."""
        self._metrics.waited(model, "dispatched", now - waiting.enqueued_at)
        self._left(waiting)

    def withdraw(self, live: LiveSession, outcome: str) -> None:
        """Takes a session out that is not to run."""
        waiting = self._queue.remove(live.log.session_id)
        if waiting is not None:
            seconds = time.monotonic() - waiting.enqueued_at
            self._metrics.waited(live.model or "", outcome, seconds)
            self._left(waiting)

    def review_hosts(self, kept: KeptValues) -> None:
        """Has hosts load what is asked for, and tells those who wait for it."""
        concerned = self._untold & self._live.keys()
        self._untold.clear()
        for model in self._hosting.review(kept, time.monotonic()):
            concerned.update(waiting.session_id for waiting in self._queue.waiting_for(model))
        for session_id in concerned:
            live = self._live[session_id]
            if live.work is None and self._hosting.text(models_of(live.session)):
                self._show_position(session_id, self._positions.shown(session_id))

    def _left(self, waiting: WaitingSession) -> None:
        self._positions.left(waiting.session_id)
        self._intake.count(waiting.user, -1)
        self._observer.queue_changed(waiting)

    def _show_position(self, session_id: SessionId, position: int) -> None:
        live = self._live[session_id]
        waits_for = self._hosting.text(models_of(live.session))
        self._book.publish(live.log, events.queued(position, waits_for))

"""Sessions that have had their quantum give their place to others, and come back for it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from insitu_scheduler import events
from insitu_scheduler.segments import count_traces
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_scheduler.background import Background
    from insitu_scheduler.charging import Charging
    from insitu_scheduler.events import EventBook
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.live_session import LiveSession
    from insitu_scheduler.places import SessionPlaces
    from insitu_scheduler.queue import WaitingSession
    from insitu_scheduler.waiting_room import WaitingRoom


class Quantum:
    """Bounds how long a session runs without a break while others wait."""

    def __init__(
        self,
        seconds: float,
        *,
        queue: FairQueue,
        room: WaitingRoom,
        charging: Charging,
        book: EventBook,
        background: Background,
        on_free: Callable[[], None],
    ) -> None:
        """Makes it.

        Args:
            seconds: of a group's time.
            queue: tells whether others wait.
            room: where those wait who have yielded.
            charging: knows what a session has had.
            book: where they are told.
            background: tells groups to hold sessions.
            on_free: called when a place has become free.
        """
        self._seconds = seconds
        self._queue = queue
        self._room = room
        self._charging = charging
        self._book = book
        self._background = background
        self._on_free = on_free

    def used(self, live: LiveSession, seconds: float) -> None:
        """Takes note of what a session has had so far: after a quantum it gives way to others."""
        live.seconds = seconds
        turn, places = live.turn, live.places
        if turn is None or places is None:
            return
        is_over = not turn.is_alone and self._charging.spent_here(live) >= self._seconds
        if is_over and self._queue.has_others(places.here, live.log.user):
            self._yield(live, turn, places)
        elif self._charging.spent(live) >= self._seconds:
            self._charging.renew_turn(live, self._seconds)

    def go_on(self, live: LiveSession) -> None:
        """Has a session go on that had yielded, and has been called again."""
        assert live.places is not None
        live.places.come_back()
        live.clock.go_on()
        self._book.publish(live.log, events.running(0, count_traces(live.session)))
        self._pause(live, goes_on=True)

    def _yield(self, live: LiveSession, turn: WaitingSession, places: SessionPlaces) -> None:
        self._charging.end_turn(live)
        places.leave()
        live.clock.stop()
        again = replace(
            turn,
            model=places.here,
            others=frozenset(places.leases) - {places.here},
            pins=places.leases,
            estimated_cost=max(live.expected_cost - (live.seconds or 0.0), self._seconds),
            enqueued_at=time.monotonic(),
            has_begun=True,
        )
        self._room.push(again, 1, is_first=True)
        self._on_free()
        if live.log.session_id in self._room:
            position = self._queue.num_ahead(again.model, again.user, again.tier, again.weight)
            self._book.publish(live.log, events.yielded(max(position, 1), self._seconds))
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

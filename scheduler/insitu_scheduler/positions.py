"""Tells waiting sessions how they move up, without drowning anybody in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.queue import SessionId

ANNOUNCE_SECONDS = 1.0


class PositionAnnouncer:
    """Shows new positions at most once a second, and only those that are news.

    A position is 1 for the session that runs next. It is news when it has changed by a tenth at
    least: a session that starts far behind is told of some dozens of moves, not of thousands.
    """

    def __init__(self, queue: FairQueue, show: Callable[[SessionId, int], None]) -> None:
        """Makes the announcer.

        Args:
            queue: tells the positions.
            show: called with a session and its new position.
        """
        self._queue = queue
        self._show = show
        self._shown: dict[SessionId, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def pushed(self, session_id: SessionId, position: int) -> None:
        """Takes in a session that waits, and what it was told."""
        self._shown[session_id] = position

    def shown(self, session_id: SessionId) -> int:
        """Gives the position that a waiting session was told last."""
        return self._shown[session_id]

    def left(self, session_id: SessionId) -> None:
        """Takes note that a session waits no more, so that others move up."""
        self._shown.pop(session_id, None)
        if self._shown and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(ANNOUNCE_SECONDS, self._announce)

    def _announce(self) -> None:
        self._timer = None
        for session_id, position in self._queue.positions():
            shown = self._shown[session_id]
            if abs(shown - position) >= max(1, shown // 10):
                self._shown[session_id] = position
                self._show(session_id, position)

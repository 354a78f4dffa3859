"""Who watches which session: an attached session that nobody watches is an orphan."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_scheduler.queue import SessionId


class Watchers:
    """Counts the watchers of attached sessions, and tells of those that lost their last."""

    def __init__(self, grace_seconds: float, on_orphaned: Callable[[SessionId], None]) -> None:
        """Makes the count.

        Args:
            grace_seconds: how long a session may be without a watcher, also before its first.
            on_orphaned: called with a session that was without for longer.
        """
        self._grace_seconds = grace_seconds
        self._on_orphaned = on_orphaned
        self._attached: Counter[SessionId] = Counter()
        self._timers: dict[SessionId, asyncio.TimerHandle] = {}

    def attach(self, session_id: SessionId, grace_seconds: float | None = None) -> None:
        """Takes in an attached session, which nobody watches yet.

        Args:
            session_id: the session.
            grace_seconds: how long it may be without its first watcher, if longer than others.
        """
        self._attached[session_id] = 0
        self._start_timer(session_id, max(grace_seconds or 0.0, self._grace_seconds))

    def join(self, session_id: SessionId) -> None:
        """Counts a watcher."""
        if session_id in self._attached:
            self._attached[session_id] += 1
            self._stop_timer(session_id)

    def leave(self, session_id: SessionId) -> None:
        """Counts a watcher that went away."""
        if session_id in self._attached:
            self._attached[session_id] -= 1
            if self._attached[session_id] == 0:
                self._start_timer(session_id, self._grace_seconds)

    def forget(self, session_id: SessionId) -> None:
        """Drops a session that has ended."""
        self._stop_timer(session_id)
        self._attached.pop(session_id, None)

    def _start_timer(self, session_id: SessionId, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[session_id] = loop.call_later(seconds, self._on_orphaned, session_id)

    def _stop_timer(self, session_id: SessionId) -> None:
        if timer := self._timers.pop(session_id, None):
            timer.cancel()

"""Ends sessions that have not ended in time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_scheduler.queue import SessionId


class Deadlines:
    """A timer for each session that has a deadline and has not ended."""

    def __init__(self, on_over: Callable[[SessionId], None]) -> None:
        """Makes it.

        Args:
            on_over: called with a session whose time is over.
        """
        self._on_over = on_over
        self._timers: dict[SessionId, asyncio.TimerHandle] = {}

    def start(self, session_id: SessionId, deadline: float | None) -> None:
        """Takes in a session.

        Args:
            session_id: the session.
            deadline: in seconds since 1970, so that it outlives this scheduler; None for none.
        """
        if deadline is not None:
            loop = asyncio.get_running_loop()
            left = max(deadline - time.time(), 0.0)
            self._timers[session_id] = loop.call_later(left, self._on_over, session_id)

    def forget(self, session_id: SessionId) -> None:
        """Drops a session that has ended."""
        if timer := self._timers.pop(session_id, None):
            timer.cancel()

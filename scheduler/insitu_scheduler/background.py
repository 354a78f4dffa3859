"""Tasks that nobody waits for, but the end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine

_log = logging.getLogger(__name__)


class Background:
    """Keeps tasks alive, and has the log tell what none of them may raise."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Starts a task."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def settle(self, timeout_seconds: float | None) -> None:
        """Waits for all tasks, but no longer than a while."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exception := task.exception()) is not None:
            _log.critical("the scheduler met a flaw", exc_info=exception)

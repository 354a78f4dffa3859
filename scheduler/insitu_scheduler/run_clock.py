"""Bounds how long a session runs; while it has yielded its place, its time stands still."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from insitu_scheduler.refusals import limit_exceeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class RunClock:
    """Of one session, for all its attempts; each has the whole time."""

    def __init__(self, seconds: float | None) -> None:
        """Makes it.

        Args:
            seconds: how long the session may run; None for as long as it takes.
        """
        self._seconds = seconds
        self._bound: asyncio.Timeout | None = None
        self._left: float | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Has time go while the block runs.

        Raises:
            CapacityError: LIMIT_EXCEEDED, once it is over.
        """
        try:
            async with asyncio.timeout(self._seconds) as self._bound:
                yield
        except TimeoutError:
            if self._seconds is None or self._bound is None or not self._bound.expired():
                raise
            ran = f"ran for longer than {self._seconds:g} seconds"
            raise limit_exceeded(ran, self._seconds, "max_run_seconds") from None
        finally:
            self._bound = None

    def stop(self) -> None:
        """Has its time stand still."""
        if self._bound is not None and (end := self._bound.when()) is not None:
            self._left = max(end - asyncio.get_running_loop().time(), 0.0)
            self._bound.reschedule(None)

    def go_on(self) -> None:
        """Has its time go on."""
        if self._bound is not None and self._left is not None:
            self._bound.reschedule(asyncio.get_running_loop().time() + self._left)
            self._left = None

"""What a segment tells, on its way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from insitu_shard.downloads import Download
    from insitu_shard.engine import SegmentEvent
    from insitu_wire.errors import Error


class Told:
    """A queue from which as much is taken at once as there is: a pass may tell of many traces."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[SegmentEvent | Error | Download] = deque()
        self._is_woken = False
        self._some = asyncio.Event()

    def put(self, event: SegmentEvent | Error | Download) -> None:
        """Adds an event, from any thread."""
        self._events.append(event)
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._some.set)

    async def take(self) -> list[SegmentEvent | Error | Download]:
        """Waits until there are events, and takes them all."""
        events: list[SegmentEvent | Error | Download] = []
        while not events:
            await self._some.wait()
            self._some.clear()
            # Before they are taken: what is added from here on wakes again.
            self._is_woken = False
            while self._events:
                events.append(self._events.popleft())
        return events

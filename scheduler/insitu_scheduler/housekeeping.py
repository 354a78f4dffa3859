"""Forgets sessions that ended long ago, with what they saved."""

from __future__ import annotations

import asyncio
import datetime
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from insitu_scheduler.events import EventBook
    from insitu_scheduler.journal import Journal
    from insitu_scheduler.results import ResultStore

_log = logging.getLogger(__name__)

_MAX_PAUSE_SECONDS = 600.0


async def keep_house(
    journal: Journal, book: EventBook, results: ResultStore, *, retention_seconds: float
) -> None:
    """Forgets, until cancelled, each session once it has ended for a time."""
    retention = datetime.timedelta(seconds=retention_seconds)
    while True:
        old = await journal.forget(datetime.datetime.now(datetime.UTC) - retention)
        for session_id in old:
            book.forget(session_id)
            await results.delete(session_id)
        if old:
            _log.info("%d sessions that ended long ago are forgotten", len(old))
        await asyncio.sleep(min(retention_seconds / 4, _MAX_PAUSE_SECONDS))

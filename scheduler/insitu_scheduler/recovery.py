"""Takes over what a scheduler left behind that stopped, or died."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from insitu_proto.v1.session_pb2 import Session
from insitu_scheduler import events
from insitu_scheduler.events import EventLog
from insitu_scheduler.live_session import LiveSession
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from insitu_scheduler.dispatch import Dispatcher
    from insitu_scheduler.events import EventBook
    from insitu_scheduler.journal import Journal, JournalledSession
    from insitu_scheduler.uploads import UploadStore

_log = logging.getLogger(__name__)


async def take_over(
    journal: Journal, book: EventBook, dispatcher: Dispatcher, uploads: UploadStore
) -> None:
    """Queues the sessions that have not ended, in the order in which they were accepted.

    One that ran is run again from the start. One that needs what is gone ends with an error.
    """
    rows = await journal.read_unfinished()
    for row in rows:
        log = EventLog(row.session_id, row.user, row.events)
        try:
            live = _revive(row, log, dispatcher, uploads)
            dispatcher.take_over(live, is_detached=row.is_detached)
        except Error as err:
            uploads.release(row.session_id)
            await book.end(log, events.failed(err))
    if rows:
        _log.warning("%d sessions had not ended when the last scheduler did", len(rows))


def _revive(
    row: JournalledSession, log: EventLog, dispatcher: Dispatcher, uploads: UploadStore
) -> LiveSession:
    session = Session.FromString(row.payload)
    needed = dispatcher.kept.groups_of(row.user, session)
    keepers = dispatcher.kept.keepers(row.user, session)
    uploads.hold(row.session_id, row.user, session.tensors)
    return LiveSession(
        log, session, row.model, needed_leases=needed, keepers=keepers, terms=row.terms
    )

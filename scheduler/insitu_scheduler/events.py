"""What happens to sessions, numbered so that a client can resume a broken stream."""

from __future__ import annotations

import asyncio
import datetime
from collections import OrderedDict
from typing import TYPE_CHECKING

from insitu_proto.v1.event_pb2 import Event, EventKind
from insitu_wire.errors import Error, Reason, error, to_failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from insitu_scheduler.journal import Journal
    from insitu_scheduler.queue import SessionId

TERMINAL_KINDS = frozenset(
    {EventKind.EVENT_KIND_COMPLETED, EventKind.EVENT_KIND_ERROR, EventKind.EVENT_KIND_CANCELLED}
)


def received() -> Event:
    """The session is about to be in the journal."""
    message = "Your session has been received and is waiting approval."
    return Event(kind=EventKind.EVENT_KIND_RECEIVED, message=message)


def approved() -> Event:
    """The session passed validation."""
    return Event(kind=EventKind.EVENT_KIND_APPROVED, message="Your session has been approved.")


def queued(position: int) -> Event:
    """The session waits at a position."""
    return Event(
        kind=EventKind.EVENT_KIND_QUEUED,
        message=f"Your session is at position {position} in the queue.",
        queue_position=position,
    )


def running(trace_number: int, num_traces: int) -> Event:
    """The session runs; trace number 0 if no trace has started."""
    where = f": trace {trace_number} of {num_traces}" if trace_number else ""
    return Event(
        kind=EventKind.EVENT_KIND_RUNNING,
        message=f"Your session is running{where}.",
        trace_number=trace_number,
        num_traces=num_traces,
    )


def logged(message: str) -> Event:
    """The session printed a message."""
    return Event(kind=EventKind.EVENT_KIND_LOG, message=message)


def completed() -> Event:
    """The session ended well."""
    return Event(kind=EventKind.EVENT_KIND_COMPLETED, message="Your session has been completed.")


def failed(err: Error) -> Event:
    """The session failed."""
    return Event(kind=EventKind.EVENT_KIND_ERROR, message=err.message, failure=to_failure(err))


def cancelled() -> Event:
    """The session was cancelled."""
    return Event(kind=EventKind.EVENT_KIND_CANCELLED, message="Your session has been cancelled.")


def kind_name(event: Event) -> str:
    """Gives the name of what happened, such as "QUEUED"."""
    return EventKind.Name(event.kind).removeprefix("EVENT_KIND_")


class EventLog:
    """One session's events, and those who follow them."""

    def __init__(self, session_id: SessionId, user: str, events: list[Event] | None = None) -> None:
        self.session_id = session_id
        self.user = user
        self._events = events or []
        self._is_closing = False
        self._changed = asyncio.Event()

    @property
    def events(self) -> Sequence[Event]:
        """All events so far."""
        return self._events

    @property
    def last(self) -> Event:
        """The newest event."""
        return self._events[-1]

    @property
    def state(self) -> Event:
        """The newest event that is no LOG: its kind is the session's state."""
        log = EventKind.EVENT_KIND_LOG
        return next(event for event in reversed(self._events) if event.kind != log)

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event is there."""
        return bool(self._events) and self.last.kind in TERMINAL_KINDS

    @property
    def is_closing(self) -> bool:
        """Whether the terminal event is decided, if not shown yet: no other may follow."""
        return self._is_closing or self.has_ended

    def stamp(self, event: Event) -> Event:
        """Gives an event its time and the next number; it must be shown next."""
        event.sequence = len(self._events) + 1
        event.time.FromDatetime(datetime.datetime.now(datetime.UTC))
        return event

    def close(self) -> None:
        """Lets no event but the terminal one be added."""
        self._is_closing = True

    def show(self, event: Event) -> None:
        """Adds an event and wakes those who follow."""
        self._events.append(event)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Yields the events after a number, waiting for new ones, to the terminal one."""
        index = after
        while True:
            while index < len(self._events):
                yield self._events[index]
                index += 1
            if self.has_ended:
                return
            await self._changed.wait()


class EventBook:
    """The event logs of all sessions: those that live, some that ended, the rest in the journal."""

    def __init__(self, journal: Journal, *, max_ended: int = 1000) -> None:
        self._journal = journal
        self._max_ended = max_ended
        self._live: dict[SessionId, EventLog] = {}
        self._ended: OrderedDict[SessionId, EventLog] = OrderedDict()

    def add(self, log: EventLog) -> None:
        """Takes in a session that has just been accepted."""
        self._live[log.session_id] = log

    def publish(self, log: EventLog, event: Event) -> None:
        """Shows an event at once; the journal has it soon after. Nothing follows the end."""
        if not log.is_closing:
            log.show(log.stamp(event))
            self._journal.append_later(log.session_id, event)

    async def end(self, log: EventLog, event: Event) -> bool:
        """Shows a terminal event once the journal has it; False if the session had ended."""
        if log.is_closing:
            return False
        log.close()
        try:
            await self._journal.append(log.session_id, log.stamp(event))
        finally:
            # Shown even if the journal failed: a client must not wait for ever.
            log.show(event)
            self._live.pop(log.session_id, None)
            self._remember(log)
        return True

    async def find(self, session_id: SessionId) -> EventLog:
        """Gives a session's log, from the journal if it is not in memory.

        Raises:
            NotFoundError: SESSION_NOT_FOUND.
        """
        log = self._live.get(session_id) or self._ended.get(session_id)
        if log is not None:
            return log
        row = await self._journal.read(session_id)
        if row is None:
            raise error(
                Reason.SESSION_NOT_FOUND,
                f"the server has no session {session_id[:80]!r}",
                sessionId=session_id[:80],
            )
        log = EventLog(session_id, row.user, row.events)
        self._remember(log)
        return log

    async def end_interrupted(self) -> int:
        """Ends the sessions that a previous process left unfinished, and counts them."""
        rows = await self._journal.read_unfinished()
        for row in rows:
            lost = error(
                Reason.REPLICA_LOST,
                "the scheduler was restarted before the session ended; submit it again",
            )
            await self.end(EventLog(row.session_id, row.user, row.events), failed(lost))
        return len(rows)

    def _remember(self, log: EventLog) -> None:
        self._ended[log.session_id] = log
        while len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)

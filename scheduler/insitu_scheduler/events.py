"""What happens to sessions, numbered so that a client can resume a broken stream."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from insitu_proto.v1.event_pb2 import Event, EventKind
from insitu_wire.error_codec import to_failure
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from insitu_proto.v1.event_pb2 import Tokens
    from insitu_scheduler.journal import Journal, SessionRow
    from insitu_scheduler.queue import SessionId

_log = logging.getLogger(__name__)

TERMINAL_KINDS = frozenset(
    {EventKind.EVENT_KIND_COMPLETED, EventKind.EVENT_KIND_ERROR, EventKind.EVENT_KIND_CANCELLED}
)

OUTPUT_KINDS = frozenset({EventKind.EVENT_KIND_LOG, EventKind.EVENT_KIND_TOKENS})
"""What a session itself tells; these are no states of it."""


def received() -> Event:
    """The session is about to be in the journal."""
    message = "Your session has been received and is waiting approval."
    return Event(kind=EventKind.EVENT_KIND_RECEIVED, message=message)


def approved() -> Event:
    """The session passed validation."""
    return Event(kind=EventKind.EVENT_KIND_APPROVED, message="Your session has been approved.")


def queued(position: int, waits_for: str = "") -> Event:
    """The session waits at a position; for something beside its turn, if that is said."""
    reason = f"; {waits_for}" if waits_for else ""
    return Event(
        kind=EventKind.EVENT_KIND_QUEUED,
        message=f"Your session is at position {position} in the queue{reason}.",
        queue_position=position,
    )


def queued_again(position: int, attempt: int, why: str = "") -> Event:
    """The session's last attempt was lost, by what is known of it, and it waits for another."""
    reason = f" ({why})" if why else ""
    return Event(
        kind=EventKind.EVENT_KIND_QUEUED,
        message=f"What ran your session was lost{reason}. It is at position {position} in the "
        f"queue again, for attempt {attempt}.",
        queue_position=position,
        attempt=attempt,
    )


def put_back() -> Event:
    """The server stops while the session runs."""
    return Event(
        kind=EventKind.EVENT_KIND_QUEUED,
        message="The server is stopping. Your session is kept, and is run again once it is back.",
        queue_position=1,
    )


def yielded(position: int, quantum_seconds: float) -> Event:
    """The session has used its quantum while others wait."""
    return Event(
        kind=EventKind.EVENT_KIND_QUEUED,
        message=f"Your session has had the {quantum_seconds:g} s that it runs without a break, and "
        f"others wait. It keeps its values and goes on from position {position} in the queue.",
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


def tokens_chosen(tokens: Tokens) -> Event:
    """A trace of the session has chosen tokens."""
    ids = ", ".join(map(str, tokens.token_ids))
    return Event(
        kind=EventKind.EVENT_KIND_TOKENS,
        message=f"Trace {tokens.trace_number} has chosen at step {tokens.step}: {ids}.",
        tokens=tokens,
    )


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


def shutting_down() -> Error:
    """Makes the error of those who ask a scheduler that stops."""
    return error(
        Reason.SHUTTING_DOWN,
        "the server is stopping; try again once it is back",
    )


class EventLog:
    """One session's events, and those who follow them.

    An event has its number before it is shown: it is shown once the journal has it, so that no
    number is ever given to another event after a restart.
    """

    def __init__(self, session_id: SessionId, user: str, events: list[Event] | None = None) -> None:
        self.session_id = session_id
        self.user = user
        self._events = events or []
        self._num_shown = len(self._events)
        self._is_closing = False
        self._is_shut = False
        self._changed = asyncio.Event()

    @property
    def events(self) -> Sequence[Event]:
        """All events so far, some of which may be about to be shown."""
        return self._events

    @property
    def last(self) -> Event:
        """The newest event that is shown."""
        return self._events[self._num_shown - 1]

    @property
    def state(self) -> Event:
        """The newest event that is shown and no output: its kind is the session's state."""
        shown = reversed(self._events[: self._num_shown])
        return next(event for event in shown if event.kind not in OUTPUT_KINDS)

    @property
    def attempt(self) -> int:
        """Which attempt at the session runs, or waits, from 1."""
        return max((event.attempt for event in self._events), default=0) or 1

    @property
    def age_seconds(self) -> float:
        """From its first event to its newest."""
        first, newest = self._events[0].time, self._events[-1].time
        return (newest.ToDatetime() - first.ToDatetime()).total_seconds()

    @property
    def num_told(self) -> int:
        """How many messages and tokens the session has told."""
        return sum(event.kind in OUTPUT_KINDS for event in self._events)

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event is there."""
        return self._num_shown > 0 and self.last.kind in TERMINAL_KINDS

    @property
    def is_closing(self) -> bool:
        """Whether the terminal event is decided, if not shown yet: no other may follow."""
        return self._is_closing or self.has_ended

    def stamp(self, event: Event) -> Event:
        """Adds an event, with its time and the next number; it is to be shown."""
        event.sequence = len(self._events) + 1
        event.time.FromDatetime(datetime.datetime.now(datetime.UTC))
        self._events.append(event)
        return event

    def close(self) -> None:
        """Lets no event but the terminal one be added."""
        self._is_closing = True

    def show(self, event: Event) -> None:
        """Shows an event, and those before it, to those who follow."""
        self._num_shown = event.sequence
        self._changed.set()
        self._changed = asyncio.Event()

    def shut(self) -> None:
        """Sends those who follow away, to come back to the next scheduler."""
        self._is_shut = True
        self._changed.set()

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Yields the events after a number, waiting for new ones, to the terminal one.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        index = after
        while True:
            while index < self._num_shown:
                yield self._events[index]
                index += 1
            if self.has_ended:
                return
            if self._is_shut:
                raise shutting_down()
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
        """Shows an event as soon as the journal has it. Nothing follows the end."""
        if not log.is_closing:
            log.stamp(event)
            self._journal.append_later(log.session_id, event, then=lambda: self._show(log, event))

    async def end(self, log: EventLog, event: Event) -> bool:
        """Shows a terminal event once the journal has it; False if the session had ended."""
        if log.is_closing:
            return False
        log.close()
        try:
            await self._journal.append(log.session_id, log.stamp(event))
        finally:
            _log.info(
                "session %s of %s has ended: %s", log.session_id, log.user, kind_name(event),
                extra={"session_id": log.session_id},
            )  # fmt: skip
            self._show(log, event)
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

    def forget(self, session_id: SessionId) -> None:
        """Forgets a session that has ended, and that the journal has forgotten."""
        self._ended.pop(session_id, None)

    async def list_sessions(
        self, user: str | None, *, limit: int, after: SessionId | None
    ) -> list[SessionRow]:
        """Gives sessions of a user, or all, the newest first, from the one after another on."""
        return await self._journal.list_sessions(user, limit=limit, after=after)

    def shut(self) -> None:
        """Sends all who follow a session away: it goes on with the next scheduler."""
        for log in self._live.values():
            log.shut()

    def _show(self, log: EventLog, event: Event) -> None:
        """Shows an event, also if the journal failed: a client must not wait for ever.

        But not if another scheduler leads: that one gives the number to an event of its own.
        """
        if self._journal.is_lost:
            log.shut()
        else:
            log.show(event)

    def _remember(self, log: EventLog) -> None:
        self._ended[log.session_id] = log
        while len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)

"""What has been accepted and what became of it, on disk before anybody is told."""

from __future__ import annotations

import asyncio
import datetime
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from insitu_proto.v1.event_pb2 import Event, EventKind
from insitu_scheduler.events import TERMINAL_KINDS, kind_name
from insitu_scheduler.queue import SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_WRITE_BEHIND_SECONDS = 0.05

_tables = sa.MetaData()
_sessions = sa.Table(
    "sessions",
    _tables,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("request_id", sa.String, nullable=False),
    sa.Column("user", sa.String, nullable=False),
    sa.Column("model", sa.String),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("payload_digest", sa.LargeBinary, nullable=False),
    # The session itself, for as long as it may have to be run.
    sa.Column("payload", sa.LargeBinary),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("finished_at", sa.DateTime(timezone=True)),
    sa.UniqueConstraint("user", "request_id"),
)
_events = sa.Table(
    "events",
    _tables,
    sa.Column("session_id", sa.ForeignKey("sessions.id"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("event", sa.LargeBinary, nullable=False),
    sa.Column("time", sa.DateTime(timezone=True), nullable=False),
)
_TERMINAL_STATES = [EventKind.Name(kind).removeprefix("EVENT_KIND_") for kind in TERMINAL_KINDS]


@dataclass(frozen=True, slots=True)
class AcceptedSession:
    """A session on its way into the journal."""

    session_id: SessionId
    request_id: str
    user: str
    model: str | None
    payload: bytes
    payload_digest: bytes


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """The session that a request id was first used for."""

    session_id: SessionId
    payload_digest: bytes


@dataclass(frozen=True, slots=True)
class JournalledSession:
    """A session as the journal has it."""

    session_id: SessionId
    user: str
    events: list[Event]


class Journal:
    """A SQLite file that one thread writes; what waits together is committed together."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
        sa.event.listen(self._engine, "connect", _make_durable)
        self._connection: sa.Connection | None = None
        self._pending: list[tuple[Callable[[sa.Connection], Any], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Future[list[Any]] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Opens the file, making it if it is missing."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)

    async def close(self) -> None:
        """Writes what is pending and closes the file."""
        await self._submit(lambda connection: None)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def find_request(self, user: str, request_id: str) -> KnownRequest | None:
        """Gives the session that a user's request id was used for."""
        return await self._submit(lambda connection: _find(connection, user, request_id))

    async def accept(self, session: AcceptedSession, events: Sequence[Event]) -> KnownRequest:
        """Writes a session and its first events, or gives the one that has its request id."""

        def write(connection: sa.Connection) -> KnownRequest:
            known = _find(connection, session.user, session.request_id)
            if known is None:
                _insert(connection, session, events)
            return known or KnownRequest(session.session_id, session.payload_digest)

        return await self._submit(write)

    async def append(self, session_id: SessionId, event: Event) -> None:
        """Writes an event and the session's state after it."""
        await self._submit(lambda connection: _append(connection, session_id, event))

    def append_later(self, session_id: SessionId, event: Event) -> None:
        """Writes an event within a moment, together with others."""
        future = self._add(lambda connection: _append(connection, session_id, event))
        future.add_done_callback(_log_failure)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_WRITE_BEHIND_SECONDS, self._flush)

    async def read(self, session_id: SessionId) -> JournalledSession | None:
        """Gives a session and its events."""
        query = sa.select(_sessions.c.id, _sessions.c.user).where(_sessions.c.id == session_id)
        found = await self._submit(lambda connection: _load(connection, query))
        return found[0] if found else None

    async def read_unfinished(self) -> list[JournalledSession]:
        """Gives the sessions that have not ended."""
        query = sa.select(_sessions.c.id, _sessions.c.user).where(
            _sessions.c.state.not_in(_TERMINAL_STATES)
        )
        return await self._submit(lambda connection: _load(connection, query))

    async def _submit(self, operation: Callable[[sa.Connection], _T]) -> _T:
        future = self._add(operation)
        self._flush()
        return await future

    def _add(self, operation: Callable[[sa.Connection], _T]) -> asyncio.Future[_T]:
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._pending.append((operation, future))
        return future

    def _flush(self) -> None:
        """Has the thread commit all that is pending, unless it is at work: then right after."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flushing is not None or not self._pending:
            return
        operations, futures = zip(*self._pending, strict=True)
        self._pending = []
        loop = asyncio.get_running_loop()
        self._flushing = loop.run_in_executor(self._thread, self._commit, operations)
        self._flushing.add_done_callback(lambda flushing: self._flushed(flushing, futures))

    def _flushed(
        self, flushing: asyncio.Future[list[Any]], futures: Sequence[asyncio.Future[Any]]
    ) -> None:
        self._flushing = None
        exception = flushing.exception()
        results = [None] * len(futures) if exception else flushing.result()
        for future, result in zip(futures, results, strict=True):
            if future.done():  # whoever waited has gone
                continue
            if exception:
                future.set_exception(exception)
            else:
                future.set_result(result)
        self._flush()

    def _connect(self) -> None:
        self._connection = self._engine.connect()
        with self._connection.begin():
            _tables.create_all(self._connection)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _commit(self, operations: Sequence[Callable[[sa.Connection], Any]]) -> list[Any]:
        if self._connection is None:
            raise RuntimeError("the journal is not open")
        with self._connection.begin():
            return [operation(self._connection) for operation in operations]


def _log_failure(written: asyncio.Future[None]) -> None:
    if not written.cancelled() and (exception := written.exception()) is not None:
        _log.critical("the journal can not be written", exc_info=exception)


def _make_durable(connection: Any, record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _find(connection: sa.Connection, user: str, request_id: str) -> KnownRequest | None:
    query = sa.select(_sessions.c.id, _sessions.c.payload_digest).where(
        _sessions.c.user == user, _sessions.c.request_id == request_id
    )
    row = connection.execute(query).one_or_none()
    return KnownRequest(SessionId(row.id), row.payload_digest) if row else None


def _insert(connection: sa.Connection, session: AcceptedSession, events: Sequence[Event]) -> None:
    connection.execute(
        sa.insert(_sessions).values(
            id=session.session_id,
            request_id=session.request_id,
            user=session.user,
            model=session.model,
            state=kind_name(events[-1]),
            payload_digest=session.payload_digest,
            payload=session.payload,
            created_at=_time(events[0]),
        )
    )
    rows = [_event_row(session.session_id, event) for event in events]
    connection.execute(sa.insert(_events), rows)


def _append(connection: sa.Connection, session_id: SessionId, event: Event) -> None:
    connection.execute(sa.insert(_events).values(**_event_row(session_id, event)))
    if event.kind == EventKind.EVENT_KIND_LOG:
        return
    values: dict[str, object] = {"state": kind_name(event)}
    if event.kind in TERMINAL_KINDS:
        values |= {"finished_at": _time(event), "payload": None}
    connection.execute(sa.update(_sessions).where(_sessions.c.id == session_id).values(**values))


def _load(connection: sa.Connection, query: sa.Select[Any]) -> list[JournalledSession]:
    events = sa.select(_events.c.event).order_by(_events.c.sequence)
    return [
        JournalledSession(
            SessionId(row.id),
            row.user,
            [
                Event.FromString(blob)
                for blob in connection.scalars(events.where(_events.c.session_id == row.id))
            ],
        )
        for row in connection.execute(query).all()
    ]


def _event_row(session_id: SessionId, event: Event) -> dict[str, object]:
    return {
        "session_id": session_id,
        "sequence": event.sequence,
        "kind": kind_name(event),
        "event": event.SerializeToString(),
        "time": _time(event),
    }


def _time(event: Event) -> datetime.datetime:
    return event.time.ToDatetime(tzinfo=datetime.UTC)

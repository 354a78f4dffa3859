"""What has been accepted and what became of it, on disk before anybody is told."""

from __future__ import annotations

import asyncio
import datetime
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from insitu_proto.v1.event_pb2 import Event, EventKind
from insitu_scheduler.committer import Committer
from insitu_scheduler.events import OUTPUT_KINDS, TERMINAL_KINDS, kind_name
from insitu_scheduler.leadership import check_alive, try_to_lead
from insitu_scheduler.queue import SessionId
from insitu_scheduler.terms import Terms
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from insitu_scheduler.committer import OnCommit

_log = logging.getLogger(__name__)

# How long a scheduler that stands by takes at most to notice that the other is gone.
_STANDBY_SECONDS = 0.5
_WATCH_SECONDS = 1.0

TABLES = sa.MetaData()
_sessions = sa.Table(
    "sessions",
    TABLES,
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
    sa.Column("is_detached", sa.Boolean, nullable=False),
    sa.Column("terms", sa.String, nullable=False, server_default=""),
    sa.UniqueConstraint("user", "request_id"),
)
_events = sa.Table(
    "events",
    TABLES,
    sa.Column("session_id", sa.ForeignKey("sessions.id"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("event", sa.LargeBinary, nullable=False),
    sa.Column("time", sa.DateTime(timezone=True), nullable=False),
)
sa.Table("epochs", TABLES, sa.Column("epoch", sa.Integer, nullable=False))
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
    is_detached: bool = False
    """Whether it lives without anybody watching it."""
    terms: Terms = field(default_factory=Terms)


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
    model: str | None
    payload: bytes
    """The session; empty once it has ended."""
    is_detached: bool
    terms: Terms
    events: list[Event]


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What a list shows of a session."""

    session_id: SessionId
    user: str
    model: str | None
    state: str
    """Name of its newest event that is no LOG, such as "QUEUED"."""
    created_at: datetime.datetime
    finished_at: datetime.datetime | None


class Journal:
    """The sessions and their events, in a SQLite file or a PostgreSQL database."""

    def __init__(
        self,
        url: str,
        on_commit: OnCommit | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """Makes it; nothing is opened yet.

        Args:
            url: where it is: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/DATABASE`.
            on_commit: told of each commit, on a thread of the journal's.
            on_lost: called when the database is gone, or another scheduler leads.

        Raises:
            ConfigurationError: the URL is of none of these.
        """
        self._url = _parse(url)
        self._committer = Committer(self._url, on_commit, on_lost)
        self._watching: asyncio.Task[None] | None = None
        self.epoch = 0
        """Which lead this is, from 1; 0 before it is open."""

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be written any more, for the database is gone or another leads."""
        return self._committer.is_lost

    @property
    def is_shared(self) -> bool:
        """Whether other schedulers may stand by for this journal."""
        return self._url.get_backend_name() == "postgresql"

    @property
    def num_pending(self) -> int:
        """Counts what waits to be written."""
        return self._committer.num_pending

    async def open(self) -> None:
        """Opens it, making it if it is missing, with the newest version of the tables.

        Stands by for as long as another scheduler has it open.

        Raises:
            ConfigurationError: it is not a journal, or can not be reached.
        """
        try:
            await self._committer.open()
            self.epoch = await self._lead()
        except sa.exc.DatabaseError as exception:
            await self._committer.close()
            place = self._url.render_as_string(hide_password=True)
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"the journal {place} can not be opened ({exception.orig}); see whether the "
                "database is there, or choose another with --journal or --data-dir",
                journal=place,
            ) from exception
        if self.is_shared:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Writes what is pending and closes it."""
        if self._watching is not None:
            self._watching.cancel()
        await self._committer.close()

    async def _lead(self) -> int:
        has_told = False
        while (epoch := await self._committer.run(try_to_lead)) is None:
            if not has_told:
                _log.info("another scheduler leads; standing by")
                has_told = True
            await asyncio.sleep(_STANDBY_SECONDS)
        return epoch

    async def _watch(self) -> None:
        """Notices that the connection has broken, also while nothing is written."""
        while not self.is_lost:
            await asyncio.sleep(_WATCH_SECONDS)
            with suppress(sa.exc.DBAPIError):
                await self._committer.run(check_alive)

    async def find_request(self, user: str, request_id: str) -> KnownRequest | None:
        """Gives the session that a user's request id was used for."""
        return await self._committer.run(lambda connection: _find(connection, user, request_id))

    async def accept(self, session: AcceptedSession, events: Sequence[Event]) -> KnownRequest:
        """Writes a session and its first events, or gives the one that has its request id."""

        def write(connection: sa.Connection) -> KnownRequest:
            known = _find(connection, session.user, session.request_id)
            if known is None:
                _insert(connection, session, events)
            return known or KnownRequest(session.session_id, session.payload_digest)

        return await self._committer.run(write)

    async def append(self, session_id: SessionId, event: Event) -> None:
        """Writes an event and the session's state after it."""
        await self._committer.run(lambda connection: _append(connection, session_id, event))

    def append_later(
        self, session_id: SessionId, event: Event, *, then: Callable[[], None]
    ) -> None:
        """Writes an event within a moment, together with others, and calls back after it."""
        self._committer.run_later(lambda connection: _append(connection, session_id, event), then)

    async def read(self, session_id: SessionId) -> JournalledSession | None:
        """Gives a session and its events."""
        query = sa.select(_sessions).where(_sessions.c.id == session_id)
        found = await self._committer.run(lambda connection: _load(connection, query))
        return found[0] if found else None

    async def list_sessions(
        self, user: str | None, *, limit: int, after: SessionId | None = None
    ) -> list[SessionRow]:
        """Gives sessions of a user, or all, the newest first, from the one after another on."""
        theirs = sa.true() if user is None else _sessions.c.user == user
        newest_first = (_sessions.c.created_at.desc(), _sessions.c.id)
        query = sa.select(_sessions).where(theirs).order_by(*newest_first).limit(limit)
        if after is not None:
            # Another user's session is none to go on after.
            is_last = sa.and_(_sessions.c.id == after, theirs)
            last = sa.select(_sessions.c.created_at, _sessions.c.id).where(is_last)
            time, id_ = last.subquery().c
            older = sa.select(time).scalar_subquery() > _sessions.c.created_at
            beside = sa.and_(
                sa.select(time).scalar_subquery() == _sessions.c.created_at,
                sa.select(id_).scalar_subquery() < _sessions.c.id,
            )
            query = query.where(sa.or_(older, beside))
        return await self._committer.run(lambda connection: _rows(connection, query))

    async def forget(self, ended_before: datetime.datetime) -> list[SessionId]:
        """Forgets the sessions that ended before a time, and gives their ids."""

        def delete(connection: sa.Connection) -> list[SessionId]:
            old = sa.select(_sessions.c.id).where(_sessions.c.finished_at < ended_before)
            ids = [SessionId(found) for found in connection.scalars(old)]
            connection.execute(sa.delete(_events).where(_events.c.session_id.in_(old)))
            connection.execute(sa.delete(_sessions).where(_sessions.c.finished_at < ended_before))
            return ids

        return await self._committer.run(delete)

    async def models_since(self, time: datetime.datetime) -> list[str]:
        """Gives the models that sessions began with that were accepted since a time."""
        lately = sa.and_(_sessions.c.created_at >= time, _sessions.c.model.is_not(None))
        query = sa.select(_sessions.c.model).where(lately).distinct()
        return await self._committer.run(lambda connection: list(connection.scalars(query)))

    async def read_unfinished(self) -> list[JournalledSession]:
        """Gives the sessions that have not ended, in the order in which they were accepted."""
        query = (
            sa.select(_sessions)
            .where(_sessions.c.state.not_in(_TERMINAL_STATES))
            .order_by(_sessions.c.created_at, _sessions.c.id)
        )
        return await self._committer.run(lambda connection: _load(connection, query))


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> list[SessionRow]:
    return [
        SessionRow(
            SessionId(row.id), row.user, row.model, row.state, row.created_at, row.finished_at
        )
        for row in connection.execute(query).all()
    ]


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
            is_detached=session.is_detached,
            terms=session.terms.written(),
            created_at=_time(events[0]),
        )
    )
    rows = [_event_row(session.session_id, event) for event in events]
    connection.execute(sa.insert(_events), rows)


def _append(connection: sa.Connection, session_id: SessionId, event: Event) -> None:
    connection.execute(sa.insert(_events).values(**_event_row(session_id, event)))
    if event.kind in OUTPUT_KINDS:
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
            row.model,
            row.payload or b"",
            row.is_detached,
            Terms.read(row.terms),
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


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        parsed = sa.make_url("unknown://")
    match parsed.get_backend_name():
        case "sqlite":
            return parsed
        case "postgresql":
            return parsed.set(drivername="postgresql+psycopg")
    raise error(
        Reason.INVALID_CONFIGURATION,
        f"--journal is of the kind {parsed.drivername!r}; it must be sqlite:///FILE or "
        "postgresql://USER:PASSWORD@HOST/DATABASE",
        journal=parsed.drivername,
    )

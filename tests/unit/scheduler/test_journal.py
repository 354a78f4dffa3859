"""What the journal is told, it has, also after a restart."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from insitu_proto.v1.event_pb2 import EventKind
from insitu_scheduler import events
from insitu_scheduler.events import EventBook, EventLog
from insitu_scheduler.journal import TABLES, AcceptedSession, Journal
from insitu_scheduler.queue import SessionId
from insitu_wire.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


# As the first release made them.
_FIRST_VERSION = """
create table sessions (id varchar primary key, request_id varchar not null, user varchar not null,
    model varchar, state varchar not null, payload_digest blob not null, payload blob,
    created_at datetime not null, finished_at datetime, unique (user, request_id));
create index ix_sessions_state on sessions (state);
create table events (session_id varchar references sessions (id), sequence integer,
    kind varchar not null, event blob not null, time datetime not null,
    primary key (session_id, sequence));
insert into sessions values ('old', 'r', 'ann', 'a', 'QUEUED', x'00', x'7061796c6f6164',
    '2026-01-01 00:00:00.000000', null);
"""


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.sqlite")
    await journal.open()
    yield journal
    await journal.close()


def accepted(
    session_id: str = "s1", *, request_id: str = "r1", user: str = "ann"
) -> AcceptedSession:
    return AcceptedSession(SessionId(session_id), request_id, user, "a", b"payload", b"digest")


def first_events(log: EventLog) -> EventLog:
    for event in (events.received(), events.approved(), events.queued(1)):
        log.show(log.stamp(event))
    return log


async def accept(journal: Journal, session: AcceptedSession) -> EventLog:
    log = first_events(EventLog(session.session_id, session.user))
    await journal.accept(session, log.events)
    return log


def rows(tmp_path: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_an_accepted_session_and_its_events_are_on_disk(
    journal: Journal, tmp_path: Path
) -> None:
    await accept(journal, accepted())
    assert rows(tmp_path, "select id, user, state, payload from sessions") == [
        ("s1", "ann", "QUEUED", b"payload")
    ]
    assert rows(tmp_path, "select sequence, kind from events") == [
        (1, "RECEIVED"), (2, "APPROVED"), (3, "QUEUED"),
    ]  # fmt: skip


async def test_a_request_id_is_answered_by_its_first_session_for_each_user(
    journal: Journal,
) -> None:
    await accept(journal, accepted("s1"))
    again = await journal.accept(accepted("s2"), [])
    assert again.session_id == "s1"
    await accept(journal, accepted("s3", user="bob"))
    known = await journal.find_request("bob", "r1")
    assert known is not None
    assert known.session_id == "s3"
    assert await journal.find_request("ann", "r2") is None


async def test_of_two_submissions_at_once_one_is_taken(journal: Journal) -> None:
    log = first_events(EventLog(SessionId("s1"), "ann"))
    both = await asyncio.gather(
        journal.accept(accepted("s1"), log.events), journal.accept(accepted("s2"), log.events)
    )
    assert {known.session_id for known in both} == {"s1"}


async def test_the_state_follows_the_events_and_the_payload_goes_at_the_end(
    journal: Journal, tmp_path: Path
) -> None:
    log = await accept(journal, accepted())
    book = EventBook(journal)
    book.publish(log, events.running(1, 1))
    book.publish(log, events.logged("hello"))
    await book.end(log, events.completed())
    assert rows(tmp_path, "select state, payload, finished_at is null from sessions") == [
        ("COMPLETED", None, 0)
    ]
    stored = await journal.read(SessionId("s1"))
    assert stored is not None
    assert stored.events == log.events


async def test_an_event_that_nobody_waits_for_is_written_soon(
    journal: Journal, tmp_path: Path
) -> None:
    log = await accept(journal, accepted())
    EventBook(journal).publish(log, events.running(1, 1))
    async with asyncio.timeout(2):
        while rows(tmp_path, "select state from sessions") != [("RUNNING",)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_closing_writes_what_is_pending(tmp_path: Path) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.sqlite")
    await journal.open()
    log = await accept(journal, accepted())
    EventBook(journal).publish(log, events.running(1, 1))
    await journal.close()
    assert rows(tmp_path, "select state from sessions") == [("RUNNING",)]


async def test_what_has_not_ended_is_found_in_the_order_of_acceptance(journal: Journal) -> None:
    logs = [
        await accept(journal, accepted(f"s{number}", request_id=f"r{number}"))
        for number in range(3)
    ]
    await EventBook(journal).end(logs[1], events.completed())
    found = await journal.read_unfinished()
    assert [(row.session_id, row.payload) for row in found] == [
        ("s0", b"payload"),
        ("s2", b"payload"),
    ]
    assert found[1].events == logs[2].events


async def test_an_event_is_on_disk_before_it_is_shown(journal: Journal, tmp_path: Path) -> None:
    log = await accept(journal, accepted())
    EventBook(journal).publish(log, events.running(1, 1))
    assert log.state.kind != EventKind.EVENT_KIND_RUNNING
    async for event in log.follow(3):
        assert rows(tmp_path, "select kind from events where sequence = 4") == [("RUNNING",)]
        assert event.kind == EventKind.EVENT_KIND_RUNNING
        break


async def test_a_journal_of_an_older_version_is_brought_up_to_date(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.executescript(_FIRST_VERSION)
    connection.close()
    journal = Journal(f"sqlite:///{tmp_path}/journal.sqlite")
    await journal.open()
    (found,) = await journal.read_unfinished()
    assert (found.session_id, found.payload, found.is_detached) == ("old", b"payload", False)
    await accept(journal, accepted())
    await journal.close()


async def test_the_tables_are_what_the_migrations_make(journal: Journal, tmp_path: Path) -> None:
    with sa.create_engine(f"sqlite:///{tmp_path / 'journal.sqlite'}").connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, TABLES) == []


async def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_text("something else than a database\n" * 100)
    with pytest.raises(ConfigurationError, match="--data-dir"):
        await Journal(f"sqlite:///{path}").open()

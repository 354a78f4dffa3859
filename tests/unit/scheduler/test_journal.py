"""What the journal is told, it has, also after a restart."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import pytest

from insitu_scheduler import events
from insitu_scheduler.events import EventBook, EventLog
from insitu_scheduler.journal import AcceptedSession, Journal
from insitu_scheduler.queue import SessionId
from insitu_wire.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
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
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    log = await accept(journal, accepted())
    EventBook(journal).publish(log, events.running(1, 1))
    await journal.close()
    assert rows(tmp_path, "select state from sessions") == [("RUNNING",)]


async def test_sessions_that_a_restart_interrupted_end_with_an_error(journal: Journal) -> None:
    await accept(journal, accepted())
    book = EventBook(journal)
    assert await book.end_interrupted() == 1
    assert await book.end_interrupted() == 0
    log = await book.find(SessionId("s1"))
    assert log.has_ended
    assert "the scheduler was restarted" in log.last.message
    assert log.last.sequence == 4


async def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_text("something else than a database\n" * 100)
    with pytest.raises(ConfigurationError, match="--data-dir"):
        await Journal(path).open()

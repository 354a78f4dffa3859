"""Events are numbered without gaps and can be followed from any of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from insitu_scheduler import events
from insitu_scheduler.events import EventBook, EventLog
from insitu_scheduler.journal import AcceptedSession, Journal
from insitu_scheduler.queue import SessionId
from insitu_wire.errors import NotFoundError, Reason, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.sqlite")
    await journal.open()
    yield journal
    await journal.close()


async def new_log(journal: Journal, book: EventBook, name: str = "s1") -> EventLog:
    log = EventLog(SessionId(name), "ann")
    log.show(log.stamp(events.received()))
    session = AcceptedSession(log.session_id, name, "ann", None, b"", b"")
    await journal.accept(session, log.events)
    book.add(log)
    return log


async def sequences(log: EventLog, after: int = 0) -> list[int]:
    return [event.sequence async for event in log.follow(after)]


async def test_a_follower_sees_past_events_and_new_ones_to_the_end(journal: Journal) -> None:
    book = EventBook(journal)
    log = await new_log(journal, book)
    following = asyncio.create_task(sequences(log))
    await asyncio.sleep(0)
    book.publish(log, events.running(1, 1))
    await book.end(log, events.completed())
    assert await following == [1, 2, 3]
    assert await sequences(log, after=2) == [3]
    assert await sequences(log, after=3) == []


async def test_nothing_follows_the_end_and_only_the_first_end_counts(journal: Journal) -> None:
    book = EventBook(journal)
    log = await new_log(journal, book)
    assert await asyncio.gather(
        book.end(log, events.completed()), book.end(log, events.cancelled())
    ) == [True, False]
    book.publish(log, events.logged("late"))
    assert [event.message for event in log.events][1:] == ["Your session has been completed."]


async def test_a_session_that_left_memory_is_served_from_the_journal(journal: Journal) -> None:
    book = EventBook(journal, max_ended=1)
    logs = [await new_log(journal, book, name) for name in ("s1", "s2")]
    for log in logs:
        await book.end(log, events.completed())
    found = await book.find(SessionId("s1"))
    assert found is not logs[0]
    assert (found.user, found.events) == ("ann", logs[0].events)
    assert await sequences(found) == [1, 2]


async def test_an_unknown_session_is_not_found(journal: Journal) -> None:
    with pytest.raises(NotFoundError, match="'nope'"):
        await EventBook(journal).find(SessionId("nope"))


def test_each_event_has_its_sentence() -> None:
    failure = error(Reason.REPLICA_LOST, "the group was lost", groupId="g")
    assert [
        event.message
        for event in (
            events.received(),
            events.approved(),
            events.queued(3),
            events.running(2, 5),
            events.running(0, 0),
            events.logged("hello"),
            events.completed(),
            events.failed(failure),
            events.cancelled(),
        )
    ] == [
        "Your session has been received and is waiting approval.",
        "Your session has been approved.",
        "Your session is at position 3 in the queue.",
        "Your session is running: trace 2 of 5.",
        "Your session is running.",
        "hello",
        "Your session has been completed.",
        "the group was lost",
        "Your session has been cancelled.",
    ]

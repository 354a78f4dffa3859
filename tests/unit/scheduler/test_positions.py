"""Waiting sessions are told how they move up, but only what is news."""

from __future__ import annotations

import asyncio

import pytest

from insitu_scheduler import positions
from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.positions import PositionAnnouncer
from insitu_scheduler.queue import SessionId, WaitingSession


def fill(queue: FairQueue, announcer: PositionAnnouncer, count: int) -> list[SessionId]:
    ids = [SessionId(str(number)) for number in range(1, count + 1)]
    for position, session_id in enumerate(ids, start=1):
        queue.push(WaitingSession(session_id, "ann", "a", estimated_cost=1, enqueued_at=0))
        announcer.pushed(session_id, position)
    return ids


@pytest.mark.parametrize(
    ("num_leaving", "told"),
    [(1, [*range(1, 19)]), (2, [*range(1, 28)])],
    ids=["by one", "by two"],
)
async def test_moves_are_told_once_and_far_behind_only_by_tenths(
    num_leaving: int, told: list[int]
) -> None:
    queue, shown = FairQueue(), []
    announcer = PositionAnnouncer(queue, lambda _, position: shown.append(position))
    ids = fill(queue, announcer, 40)
    for session_id in ids[:num_leaving]:
        queue.remove(session_id)
        announcer.left(session_id)
    assert shown == []
    await asyncio.sleep(positions.ANNOUNCE_SECONDS + 0.1)
    assert shown == told

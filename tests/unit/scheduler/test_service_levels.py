"""What a newcomer would wait, and how evenly users are served."""

from __future__ import annotations

import math

import pytest

from insitu_scheduler.fair_line import FairLine
from insitu_scheduler.queue import SessionId, WaitingSession
from insitu_scheduler.service_levels import Shares, expected_wait


@pytest.mark.parametrize(
    ("ahead", "running", "groups", "has_room", "expected"),
    [
        (0.0, 5.0, 1, True, 0.0),
        (0.0, 8.0, 1, False, 4.0),
        (6.0, 8.0, 2, False, 5.0),
        (6.0, 0.0, 1, True, 6.0),
        (0.0, 0.0, 0, False, math.inf),
    ],
)
def test_the_expected_wait_is_what_is_ahead_and_half_of_what_runs(
    ahead: float, running: float, groups: int, has_room: bool, expected: float
) -> None:
    found = expected_wait(
        cost_ahead=ahead, cost_running=running, num_groups=groups, has_room=has_room
    )
    assert found == expected


def test_a_newcomer_has_only_those_ahead_who_have_had_no_more_than_the_clock_says() -> None:
    line = FairLine(max_wait_seconds=1e9)
    for number in range(3):
        line.push(_session(f"flood {number}", "ann"))
    assert line.cost_ahead == 2.0
    first = next(line.in_turn(0.0))
    line.serve(first, first.estimated_cost, now=0.0)
    # Ann has had her turn: her next comes after a newcomer's first.
    assert line.cost_ahead == 0.0
    line.push(_session("light", "bob"))
    assert line.cost_ahead == 2.0
    assert line.busy_since.keys() == {"ann", "bob"}


def _session(name: str, user: str) -> WaitingSession:
    return WaitingSession(SessionId(name), user, "a", 2.0, 0.0)


def test_fairness_is_one_where_all_who_waited_got_the_same() -> None:
    shares = Shares()
    for second in range(60):
        shares.add("ann", 0.5, now=100.0 + second)
        shares.add("bob", 0.5, now=100.0 + second)
    assert shares.fairness({"ann": 0.0, "bob": 0.0}, now=160.0) == pytest.approx(1.0)
    # One who waits and gets nothing makes it two thirds.
    assert shares.fairness({"ann": 0, "bob": 0, "cy": 0}, now=160.0) == pytest.approx(2 / 3)


def test_who_has_waited_for_less_than_the_window_does_not_count() -> None:
    shares = Shares()
    shares.add("ann", 1.0, now=100.0)
    assert shares.fairness({"ann": 0.0, "late": 90.0}, now=110.0) == 1.0
    assert shares.fairness({}, now=110.0) == 1.0


def test_what_is_long_ago_is_forgotten() -> None:
    shares = Shares()
    shares.add("ann", 100.0, now=0.0)
    shares.add("ann", 1.0, now=100.0)
    shares.add("bob", 1.0, now=100.0)
    assert shares.fairness({"ann": 0.0, "bob": 0.0}, now=101.0) == 1.0

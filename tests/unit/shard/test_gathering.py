"""A round waits for sessions that are about to come, and no longer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu_shard.gathering import Gathering

USERS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=6)


def test_a_session_that_comes_alone_does_not_wait() -> None:
    gathering = Gathering()
    assert not gathering.seconds_left("a", now=5.0)
    gathering.ended("a", seconds=0.1, now=6.0)
    assert not gathering.seconds_left("a", now=6.0)


def test_those_who_come_back_together_wait_for_each_other() -> None:
    gathering = Gathering()
    gathering.ended("abb", seconds=0.125, now=6.0)
    assert gathering.seconds_left("b", now=6.0) == 0.125
    assert gathering.seconds_left("ab", now=6.0625) == 0.0625
    assert not gathering.seconds_left("abb", now=6.0625)


def test_nobody_waits_beside_one_who_was_not_there() -> None:
    gathering = Gathering()
    gathering.ended("abc", seconds=0.125, now=6.0)
    assert not gathering.seconds_left("d", now=6.0)
    assert gathering.seconds_left("a", now=6.0) == 0.125
    assert not gathering.seconds_left("ad", now=6.0)


def test_they_do_not_wait_longer_than_the_round_took_nor_than_a_moment() -> None:
    gathering = Gathering(max_seconds=0.25)
    gathering.ended("abc", seconds=0.125, now=6.0)
    assert not gathering.seconds_left("ab", now=6.125)
    gathering.ended("abc", seconds=60.0, now=80.0)
    assert gathering.seconds_left("ab", now=80.0) == 0.25


def test_one_who_does_not_come_is_not_waited_for_again() -> None:
    gathering = Gathering()
    gathering.ended("abc", seconds=0.125, now=6.0)
    gathering.ended("ab", seconds=0.125, now=6.25)
    assert not gathering.seconds_left("ab", now=6.25)


@given(before=USERS, there=USERS, took=st.floats(0, 10), pause=st.floats(0, 10))
def test_who_waits_was_spared_the_others_turns_for_as_long(
    before: list[str], there: list[str], took: float, pause: float
) -> None:
    """Only who shared the round before waits, and then no longer than that took for all of them."""
    gathering = Gathering()
    gathering.ended(before, seconds=took, now=100.0)
    waits = gathering.seconds_left(there, now=100.0 + pause)
    assert waits <= max(took - pause, 0.0) + 1e-9
    if waits:
        assert set(there) <= set(before)
        assert len(before) > 1

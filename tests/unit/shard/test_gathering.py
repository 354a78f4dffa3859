"""A round waits for sessions that are about to come, and no longer."""

from __future__ import annotations

from insitu_shard.gathering import Gathering


def test_a_session_that_comes_alone_does_not_wait() -> None:
    gathering = Gathering()
    assert not gathering.seconds_left(1, now=5.0)
    gathering.ended(1, seconds=0.1, now=6.0)
    assert not gathering.seconds_left(1, now=6.0)


def test_those_who_come_back_together_wait_for_each_other() -> None:
    gathering = Gathering()
    gathering.ended(3, seconds=0.125, now=6.0)
    assert gathering.seconds_left(1, now=6.0) == 0.125
    assert gathering.seconds_left(2, now=6.0625) == 0.0625
    assert not gathering.seconds_left(3, now=6.0625)


def test_they_do_not_wait_longer_than_the_round_took_nor_than_a_moment() -> None:
    gathering = Gathering(max_seconds=0.25)
    gathering.ended(3, seconds=0.125, now=6.0)
    assert not gathering.seconds_left(2, now=6.125)
    gathering.ended(3, seconds=60.0, now=80.0)
    assert gathering.seconds_left(2, now=80.0) == 0.25


def test_one_who_does_not_come_is_not_waited_for_again() -> None:
    gathering = Gathering()
    gathering.ended(3, seconds=0.125, now=6.0)
    gathering.ended(2, seconds=0.125, now=6.25)
    assert not gathering.seconds_left(2, now=6.25)

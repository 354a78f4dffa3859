"""Where the server says that waiting helps, the SDK waits, says so, and gives up in the end."""

from __future__ import annotations

import logging

import pytest

from insitu import CapacityError
from insitu._config import Config
from insitu.backends._patience import with_patience
from insitu_wire.errors import ConfigurationError, Reason, error


class Clock:
    """A server that has room from a time on, and the time."""

    def __init__(self, room_at: float) -> None:
        self.room_at = room_at
        self.now = 0.0

    def attempt(self) -> str:
        if self.now < self.room_at:
            raise error(Reason.QUEUE_FULL, "no room", retry_after_seconds=2.0)
        return "id"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, seconds: float) -> str:
        return with_patience(
            self.attempt, seconds=seconds, sleep=self.sleep, clock=lambda: self.now
        )


def test_a_session_waits_until_there_is_room_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "insitu")
    clock = Clock(room_at=30.0)
    assert clock.submit(600.0) == "id"
    assert clock.now >= 30.0
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 8
    assert all("no room" in line and "at most" in line for line in lines)


def test_it_gives_up_at_its_bound() -> None:
    clock = Clock(room_at=1000.0)
    with pytest.raises(CapacityError, match="no room"):
        clock.submit(60.0)
    assert clock.now <= 60.0


def test_zero_seconds_are_no_wait() -> None:
    clock = Clock(room_at=1.0)
    with pytest.raises(CapacityError):
        clock.submit(0.0)
    assert clock.now == 0.0


def test_what_waiting_does_not_help_is_raised_at_once() -> None:
    def attempt() -> str:
        raise error(Reason.REQUEST_TOO_LARGE, "too large")

    with pytest.raises(CapacityError, match="too large"):
        with_patience(attempt, seconds=600.0)


@pytest.mark.parametrize(
    ("name", "text", "asked"),
    [
        ("INSITU_TIER", "gold", "tier"),
        ("INSITU_SUBMIT_WAIT_SECONDS", "long", "submit_wait_seconds"),
    ],
)
def test_a_setting_that_can_not_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, asked: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError, match=text):
        getattr(Config(), asked)


def test_the_time_to_wait_arrives_with_the_error() -> None:
    from google.rpc import error_details_pb2

    from insitu_wire.error_codec import to_status

    status = to_status(error(Reason.QUOTA_EXCEEDED, "full", retry_after_seconds=1.5))
    info = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 1500

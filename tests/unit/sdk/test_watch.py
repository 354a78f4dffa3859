"""A watch outlives broken streams, shows each event once, and keeps to its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from insitu import DeadlineError, InvalidTraceError, UnavailableError
from insitu.backends import _resuming
from insitu.backends._watch import Watch
from insitu_proto.v1 import error_reason_pb2, event_pb2
from insitu_proto.v1.scheduler_service_pb2 import WatchSessionResponse
from insitu_wire.errors import Reason, error

RUNNING = event_pb2.EVENT_KIND_RUNNING
COMPLETED = event_pb2.EVENT_KIND_COMPLETED


class Server:
    """Plays one list of events a stream; a stream that does not reach the end breaks."""

    def __init__(self, *streams: list[int], failure: Any = None) -> None:
        self.streams = list(streams)
        self.afters: list[int] = []
        self.sequence = 0
        self.failure = failure

    def events(self, session_id: str, *, after: int, timeout: float) -> Iterator[Any]:
        self.afters.append(after)
        for kind in self.streams.pop(0) if self.streams else []:
            self.sequence += 1
            event = event_pb2.Event(sequence=self.sequence, kind=kind, failure=self.failure)
            yield WatchSessionResponse(event=event)
        raise error(Reason.SERVER_UNREACHABLE, "gone")

    def state(self, session_id: str) -> event_pb2.Event:
        return event_pb2.Event(kind=self.streams[-1][-1] if self.streams else RUNNING)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "MAX_PAUSE_SECONDS", 0.0)


def test_a_broken_stream_is_resumed_after_the_last_event_seen() -> None:
    server = Server([RUNNING, RUNNING], [], [RUNNING], [COMPLETED])
    assert Watch(server, "s").to_end() is None
    assert server.afters == [0, 2, 2, 3]


def test_a_stream_that_moves_on_may_break_any_number_of_times() -> None:
    server = Server(*[[RUNNING]] * 50, [COMPLETED])
    assert Watch(server, "s").to_end() is None


def test_a_session_may_be_quiet_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "MAX_STREAM_SECONDS", 0.0)
    server = Server([RUNNING], *[[]] * 50, [COMPLETED])
    assert Watch(server, "s").to_end() is None


def test_a_server_that_stays_away_is_given_up() -> None:
    server = Server([RUNNING])
    with pytest.raises(UnavailableError):
        Watch(server, "s").to_end()
    assert len(server.afters) == _resuming.MAX_ATTEMPTS


def test_time_that_is_over_is_told_unless_the_session_has_ended() -> None:
    with pytest.raises(DeadlineError, match="within 0 seconds"):
        Watch(Server([RUNNING]), "s").to_end(timeout=0)
    server = Server([RUNNING], [COMPLETED])
    assert Watch(server, "s").to_end(timeout=0) is None


def test_a_failure_is_given_also_when_asked_for_again() -> None:
    failure = error_reason_pb2.Failure(
        reason=error_reason_pb2.ERROR_REASON_SHAPE_MISMATCH, message="2 is not 3"
    )
    watch = Watch(Server([event_pb2.EVENT_KIND_ERROR], failure=failure), "s")
    assert isinstance(watch.to_end(), InvalidTraceError)
    assert isinstance(watch.to_end(), InvalidTraceError)

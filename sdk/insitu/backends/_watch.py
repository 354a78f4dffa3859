"""Follows a session on the server to its end."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from insitu._logging import log_event
from insitu.backends import _resuming
from insitu.backends._resuming import Resuming
from insitu_proto.v1 import event_pb2
from insitu_wire.error_codec import from_failure
from insitu_wire.errors import Error, Reason, UnavailableError, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insitu.backends import OnTokens
    from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse, WatchSessionResponse

_TERMINAL_KINDS = frozenset(
    {event_pb2.EVENT_KIND_COMPLETED, event_pb2.EVENT_KIND_ERROR, event_pb2.EVENT_KIND_CANCELLED}
)


class EventServer(Protocol):
    """Has sessions, and tells what happens to them."""

    def events(
        self, session_id: str, *, after: int, timeout: float
    ) -> Iterator[WatchSessionResponse]:
        """Yields a session's events after a number, as they come; the stream may break."""

    def state(self, session_id: str) -> event_pb2.Event:
        """Gives the event that tells a session's state, without waiting."""


class Watch:
    """Shows one session's events, each once, however often it is interrupted.

    Attributes:
        result: what the session saved, if it has come with the last event.
    """

    def __init__(self, server: EventServer, session_id: str) -> None:
        self.result: Sequence[FetchResultResponse] = ()
        self._server = server
        self._session_id = session_id
        self._seen = 0
        self._last: event_pb2.Event | None = None

    def to_end(
        self, timeout: float | None = None, on_tokens: OnTokens | None = None
    ) -> Error | None:
        """Waits for the session's end; gives why it failed, if it did.

        Args:
            timeout: how long to wait, in seconds; None for as long as it takes.
            on_tokens: is told tokens as they are chosen.

        Raises:
            DeadlineError: WAIT_TIMEOUT, if the session has not ended by then.
        """
        for event in self.events(timeout):
            if event.kind == event_pb2.EVENT_KIND_TOKENS and on_tokens is not None:
                told = event.tokens
                on_tokens(told.trace_number, told.step, told.token_ids)
        return self._failure()

    def events(self, timeout: float | None = None) -> Iterator[event_pb2.Event]:
        """Yields the session's events to its end, each once; those for people are shown.

        Args:
            timeout: as for `to_end`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        resuming = Resuming()
        while not self._has_ended:
            before, began, broken = self._seen, time.monotonic(), self._closed()
            try:
                yield from self._new_events(deadline)
            except UnavailableError as err:
                broken = err
            if not self._has_ended:
                deadline = self._check_time(deadline, timeout)
                resuming.broke(
                    broken,
                    has_gone_on=self._seen != before or self._is_quiet(began),
                    seconds_left=math.inf if deadline is None else deadline - time.monotonic(),
                )

    def _is_quiet(self, began: float) -> bool:
        """Whether a stream's time was over as nothing happened, with the server still there."""
        if time.monotonic() - began < _resuming.MAX_STREAM_SECONDS:
            return False
        with suppress(UnavailableError):
            self._server.state(self._session_id)
            return True
        return False

    def _new_events(self, deadline: float | None) -> Iterator[event_pb2.Event]:
        timeout = _resuming.MAX_STREAM_SECONDS
        if deadline is not None:
            timeout = min(timeout, max(deadline - time.monotonic(), 0.0))
        for response in self._server.events(self._session_id, after=self._seen, timeout=timeout):
            event, self.result = response.event, response.result
            self._seen, self._last = event.sequence, event
            if event.kind != event_pb2.EVENT_KIND_TOKENS:
                log_event(self._session_id, kind_name(event), event.message)
            yield event

    def _check_time(self, deadline: float | None, timeout: float | None) -> float | None:
        """Gives the deadline, or none if the session has ended, for its last events to be shown."""
        if deadline is None or time.monotonic() < deadline:
            return deadline
        if self._server.state(self._session_id).kind in _TERMINAL_KINDS:
            return None
        raise error(
            Reason.WAIT_TIMEOUT,
            f"session {self._session_id} has not ended within {timeout:g} seconds; it goes on: "
            "wait again, or cancel it",
            sessionId=self._session_id,
            timeoutSeconds=timeout,
        )

    def _closed(self) -> Error:
        return error(
            Reason.SERVER_UNREACHABLE,
            f"the server keeps closing the stream of session {self._session_id}; see whether "
            "it runs with `insitu status`",
            sessionId=self._session_id,
        )

    @property
    def _has_ended(self) -> bool:
        return self._last is not None and self._last.kind in _TERMINAL_KINDS

    def _failure(self) -> Error | None:
        match self._last:
            case event_pb2.Event(kind=event_pb2.EVENT_KIND_ERROR, failure=failure):
                return from_failure(failure)
            case event_pb2.Event(kind=event_pb2.EVENT_KIND_CANCELLED):
                return error(
                    Reason.SESSION_CANCELLED,
                    f"session {self._session_id} was cancelled",
                    sessionId=self._session_id,
                )
        return None


def kind_name(event: event_pb2.Event) -> str:
    """Gives the name of what happened, such as "QUEUED"."""
    return state_name(event.kind)


def state_name(kind: event_pb2.EventKind.ValueType) -> str:
    """Gives the name of a kind of event, such as "QUEUED"."""
    return event_pb2.EventKind.Name(kind).removeprefix("EVENT_KIND_")

"""Follows a session on the server to its end."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from insitu._logging import log_event
from insitu.backends import _resuming
from insitu_proto.v1 import event_pb2
from insitu_wire.error_codec import from_failure
from insitu_wire.errors import Error, Reason, UnavailableError, error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu.backends import OnTokens
    from insitu.backends.remote import RemoteBackend

_TERMINAL_KINDS = frozenset(
    {event_pb2.EVENT_KIND_COMPLETED, event_pb2.EVENT_KIND_ERROR, event_pb2.EVENT_KIND_CANCELLED}
)


class Watch:
    """Shows one session's events, each once, however often it is interrupted."""

    def __init__(self, backend: RemoteBackend, session_id: str) -> None:
        self._backend = backend
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
        num_resumes = 0
        while not self._has_ended:
            before, began, broken = self._seen, time.monotonic(), None
            try:
                yield from self._new_events(deadline)
            except UnavailableError as err:
                broken = err
            goes_on = self._seen != before or self._is_quiet(began)
            num_resumes = 0 if goes_on else num_resumes + 1
            if broken is not None and num_resumes == _resuming.MAX_RESUMES:
                raise broken
            deadline = self._check_time(deadline, timeout)
            self._pause(num_resumes, deadline)

    def _is_quiet(self, began: float) -> bool:
        """Whether a stream's time was over as nothing happened, with the server still there."""
        if self._has_ended or time.monotonic() - began < _resuming.MAX_STREAM_SECONDS:
            return False
        with suppress(UnavailableError):
            self._backend.state(self._session_id)
            return True
        return False

    def _new_events(self, deadline: float | None) -> Iterator[event_pb2.Event]:
        timeout = _resuming.MAX_STREAM_SECONDS
        if deadline is not None:
            timeout = min(timeout, max(deadline - time.monotonic(), 0.0))
        for event in self._backend.events(self._session_id, after=self._seen, timeout=timeout):
            self._seen, self._last = event.sequence, event
            if event.kind != event_pb2.EVENT_KIND_TOKENS:
                log_event(self._session_id, kind_name(event), event.message)
            yield event

    def _check_time(self, deadline: float | None, timeout: float | None) -> float | None:
        """Gives the deadline, or none if the session has ended, for its last events to be shown."""
        if self._has_ended or deadline is None or time.monotonic() < deadline:
            return deadline
        if self._backend.state(self._session_id).kind in _TERMINAL_KINDS:
            return None
        raise error(
            Reason.WAIT_TIMEOUT,
            f"session {self._session_id} has not ended within {timeout:g} seconds; it goes on: "
            "wait again, or cancel it",
            sessionId=self._session_id,
            timeoutSeconds=timeout,
        )

    def _pause(self, num_resumes: int, deadline: float | None) -> None:
        """Waits a little before a broken stream is resumed, and gives up in the end."""
        if num_resumes == _resuming.MAX_RESUMES:
            raise error(
                Reason.SERVER_UNREACHABLE,
                f"the server keeps closing the stream of session {self._session_id}; see whether "
                "it runs with `insitu status`",
                sessionId=self._session_id,
            )
        if num_resumes:
            left = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            _resuming.pause(num_resumes, left)

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

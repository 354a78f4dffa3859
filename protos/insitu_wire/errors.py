"""Every error of insitu: its reason, its gRPC code and the exception that users catch.

- Error
- - InvalidTraceError: the session is wrong, fix it
- - - UnknownModuleError: also an AttributeError, so that hasattr() works on envoys
- - AuthenticationError: no API key, or a wrong one
- - PermissionDeniedError: not yours
- - NotFoundError: no such model, session or result
- - SessionStateError: not possible in the session's state
- - LeaseLostError: the shard group was lost, submit again
- - CapacityError: a limit is reached
- - CancelledError: the session was cancelled
- - DeadlineError: the time to wait was over; also a TimeoutError
- - UnavailableError: the server can not be reached, or stops
- - ConfigurationError: a setting of this program is not usable
- - VersionError: the server is older than what was asked of it
- - ValueNotAvailableError: a value was touched that is not here
- - InterventionError: an operation of the session raised while it ran
- - InternalError: a flaw of insitu itself
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable


class Reason(StrEnum):
    """Says why; the names of `insitu.v1.ErrorReason` without their prefix."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    UNKNOWN_MODULE_PATH = auto()
    MALFORMED_SESSION = auto()
    SHAPE_MISMATCH = auto()
    UNKNOWN_OPERATION = auto()
    UNKNOWN_REFERENCE = auto()
    CYCLIC_TRACE = auto()
    UNSUPPORTED_FEATURE = auto()
    REQUEST_TOO_LARGE = auto()
    MISSING_CREDENTIAL = auto()
    INVALID_CREDENTIAL = auto()
    PERMISSION_DENIED = auto()
    MODEL_NOT_FOUND = auto()
    SESSION_NOT_FOUND = auto()
    RESULT_NOT_FOUND = auto()
    REQUEST_ID_REUSED = auto()
    QUEUE_FULL = auto()
    OUT_OF_MEMORY = auto()
    INTERVENTION_RAISED = auto()
    HOOK_POINT_NOT_REACHED = auto()
    SESSION_CANCELLED = auto()
    REPLICA_LOST = auto()
    SERVER_UNREACHABLE = auto()
    SHUTTING_DOWN = auto()
    VALUE_NOT_AVAILABLE = auto()
    CHECKSUM_MISMATCH = auto()
    INTERNAL = auto()
    INVALID_CONFIGURATION = auto()
    WAIT_TIMEOUT = auto()
    TENSOR_NOT_UPLOADED = auto()
    STORAGE_FULL = auto()
    HANDLE_NOT_FOUND = auto()
    QUOTA_EXCEEDED = auto()
    LIMIT_EXCEEDED = auto()
    TOO_MANY_ATTEMPTS = auto()
    SCHEDULER_REPLACED = auto()
    DEADLINE_EXCEEDED = auto()


@dataclass(frozen=True, slots=True)
class Location:
    """Names a line of the user's own code."""

    file: str
    line: int
    source: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}"
        return f"{text}\n    {self.source}" if self.source else text


class Error(Exception):
    """Base of all errors of insitu.

    Attributes:
        reason: why, for programs.
        message: what was wrong, what is allowed, what to do.
        metadata: every dynamic part of the message.
        location: the line of the user's code that it belongs to, if any.
        trace_number: which trace of the session failed, from 1; 0 where none did.
        remote_traceback: the server's traceback as text, if it says something.
        retry_after_seconds: after which time the same may work, where waiting helps.
    """

    retry_after_seconds: float | None = None

    def __init__(
        self,
        message: str,
        *,
        reason: Reason,
        metadata: dict[str, str] | None = None,
        location: Location | None = None,
        trace_number: int = 0,
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.location = location
        self.trace_number = trace_number
        self.remote_traceback = remote_traceback
        # Shown below a traceback; not a part of the text.
        self.add_note(f"[{reason}] see {self.page}")

    @property
    def page(self) -> str:
        """The page about the reason, in insitu's repository."""
        return f"docs/errors/{self.reason}.md"

    def __reduce__(self) -> tuple[Callable[..., Error], tuple[object, ...]]:
        """Lets it cross from one process of a program to another."""
        return _made_again, (type(self), vars(self))

    def __str__(self) -> str:
        parts = [self.message]
        if self.trace_number:
            parts.append(f"in trace {self.trace_number} of the session")
        if self.location:
            parts.append(f"at {self.location}")
        if self.remote_traceback:
            parts.append(f"where the model runs:\n{self.remote_traceback}")
        return "\n  ".join(parts)


def _made_again(kind: type[Error], fields: dict[str, Any]) -> Error:
    err = kind(fields["message"], reason=fields["reason"])
    vars(err).update(fields)
    return err


class InvalidTraceError(Error):
    """The session is wrong: fix it."""


class UnknownModuleError(InvalidTraceError, AttributeError):
    """The model has no module of this name."""


class AuthenticationError(Error):
    """The API key is missing or wrong."""


class PermissionDeniedError(Error):
    """What was asked for is not yours."""


class NotFoundError(Error):
    """There is no such model, session or result."""


class SessionStateError(Error):
    """What was asked for is not possible in the session's state."""


class LeaseLostError(Error):
    """The shard group that ran the session was lost: submit again."""


class CapacityError(Error):
    """A limit is reached."""


class CancelledError(Error):
    """The session was cancelled."""


class DeadlineError(Error, TimeoutError):
    """A time was over before the session was: the time to wait, or its deadline."""


class UnavailableError(Error):
    """The server can not be reached, or stops."""


class ConfigurationError(Error):
    """A setting of this program is not usable."""


class VersionError(Error):
    """The server is older than what was asked of it."""


class ValueNotAvailableError(Error):
    """A value was touched before it was there, or without having been saved."""


class InterventionError(Error):
    """An operation of the session raised while it ran."""


class InternalError(Error):
    """A flaw of insitu itself."""


_Code = grpc.StatusCode
_TABLE: dict[Reason, tuple[grpc.StatusCode, type[Error]]] = {
    Reason.UNKNOWN_MODULE_PATH: (_Code.INVALID_ARGUMENT, UnknownModuleError),
    Reason.MALFORMED_SESSION: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.SHAPE_MISMATCH: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.UNKNOWN_OPERATION: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.UNKNOWN_REFERENCE: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.CYCLIC_TRACE: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.HOOK_POINT_NOT_REACHED: (_Code.INVALID_ARGUMENT, InvalidTraceError),
    Reason.UNSUPPORTED_FEATURE: (_Code.UNIMPLEMENTED, VersionError),
    Reason.REQUEST_TOO_LARGE: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.QUEUE_FULL: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.OUT_OF_MEMORY: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.MISSING_CREDENTIAL: (_Code.UNAUTHENTICATED, AuthenticationError),
    Reason.INVALID_CREDENTIAL: (_Code.UNAUTHENTICATED, AuthenticationError),
    Reason.PERMISSION_DENIED: (_Code.PERMISSION_DENIED, PermissionDeniedError),
    Reason.MODEL_NOT_FOUND: (_Code.NOT_FOUND, NotFoundError),
    Reason.SESSION_NOT_FOUND: (_Code.NOT_FOUND, NotFoundError),
    Reason.RESULT_NOT_FOUND: (_Code.NOT_FOUND, NotFoundError),
    Reason.HANDLE_NOT_FOUND: (_Code.NOT_FOUND, NotFoundError),
    Reason.REQUEST_ID_REUSED: (_Code.FAILED_PRECONDITION, SessionStateError),
    Reason.INTERVENTION_RAISED: (_Code.INVALID_ARGUMENT, InterventionError),
    Reason.SESSION_CANCELLED: (_Code.CANCELLED, CancelledError),
    Reason.WAIT_TIMEOUT: (_Code.DEADLINE_EXCEEDED, DeadlineError),
    Reason.REPLICA_LOST: (_Code.ABORTED, LeaseLostError),
    Reason.SERVER_UNREACHABLE: (_Code.UNAVAILABLE, UnavailableError),
    Reason.SHUTTING_DOWN: (_Code.UNAVAILABLE, UnavailableError),
    Reason.VALUE_NOT_AVAILABLE: (_Code.FAILED_PRECONDITION, ValueNotAvailableError),
    Reason.INVALID_CONFIGURATION: (_Code.FAILED_PRECONDITION, ConfigurationError),
    Reason.TENSOR_NOT_UPLOADED: (_Code.FAILED_PRECONDITION, SessionStateError),
    Reason.STORAGE_FULL: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.QUOTA_EXCEEDED: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.LIMIT_EXCEEDED: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.TOO_MANY_ATTEMPTS: (_Code.RESOURCE_EXHAUSTED, CapacityError),
    Reason.DEADLINE_EXCEEDED: (_Code.DEADLINE_EXCEEDED, DeadlineError),
    Reason.SCHEDULER_REPLACED: (_Code.FAILED_PRECONDITION, SessionStateError),
    Reason.CHECKSUM_MISMATCH: (_Code.DATA_LOSS, InternalError),
    Reason.INTERNAL: (_Code.INTERNAL, InternalError),
}


def error(
    reason: Reason,
    message: str,
    *,
    location: Location | None = None,
    trace_number: int = 0,
    remote_traceback: str = "",
    retry_after_seconds: float | None = None,
    **metadata: object,
) -> Error:
    """Makes the exception that the table gives for a reason; `metadata` keys in lowerCamelCase."""
    err = exception_type(reason)(
        message,
        reason=reason,
        metadata={key: str(value) for key, value in metadata.items()},
        location=location,
        trace_number=trace_number,
        remote_traceback=remote_traceback,
    )
    err.retry_after_seconds = retry_after_seconds
    return err


def exception_type(reason: Reason) -> type[Error]:
    """Gives the class of a reason's exceptions."""
    return _TABLE[reason][1]


def status_code(reason: Reason) -> grpc.StatusCode:
    """Gives the gRPC code of a reason."""
    return _TABLE[reason][0]


def one_line(exception: BaseException) -> str:
    """Gives an exception's message without its line breaks."""
    return " ".join(str(exception).split())

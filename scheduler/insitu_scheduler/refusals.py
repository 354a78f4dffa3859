"""The errors that a session is refused, or stopped, with."""

from __future__ import annotations

from insitu_wire.errors import CapacityError, Error, InvalidTraceError, Reason, error

RETRY_SECONDS = 5.0
"""After which time whoever found no room may ask again."""


def malformed(message: str, **metadata: str | int) -> InvalidTraceError:
    """Makes the error for a session that breaks a rule of the schema."""
    texts = {key: str(value) for key, value in metadata.items()}
    return InvalidTraceError(message, reason=Reason.MALFORMED_SESSION, metadata=texts)


def unsupported(problem: str) -> Error:
    """Makes the error for what this server knows of, or not, but can not run."""
    return error(
        Reason.UNSUPPORTED_FEATURE,
        f"the server can not run this session: {problem}; a newer version of insitu may",
    )


def check_limit(unit: str, count: int, limit: int) -> None:
    """Refuses a session that has more of something than the server takes.

    Raises:
        CapacityError: REQUEST_TOO_LARGE.
    """
    if count > limit:
        raise CapacityError(
            f"the session has {count:,} {unit} and the server takes at most {limit:,}; send fewer "
            "or smaller tensors, or several sessions",
            reason=Reason.REQUEST_TOO_LARGE,
            metadata={"unit": unit, "count": str(count), "limit": str(limit)},
        )


def queue_full(limit: int) -> Error:
    """Makes the error for a session for which the queue has no place."""
    return error(
        Reason.QUEUE_FULL,
        f"{limit:,} sessions wait already, and the queue takes no more; try again later",
        retry_after_seconds=RETRY_SECONDS,
        maxQueuedSessions=limit,
    )


def quota_exceeded(limit: int) -> Error:
    """Makes the error for a user who has as many sessions waiting as the key allows."""
    return error(
        Reason.QUOTA_EXCEEDED,
        f"{limit:,} of your sessions wait already, and your API key allows no more at a time; try "
        "again later, or put more traces into one session",
        retry_after_seconds=RETRY_SECONDS,
        maxWaitingSessions=limit,
    )


def deadline_exceeded() -> Error:
    """Makes the error of a session that had not ended in the time that its user gave it."""
    return error(
        Reason.DEADLINE_EXCEEDED,
        "the session had not ended when its deadline was over; submit it with a later one, or none",
    )


def limit_exceeded(what: str, limit: float, name: str) -> Error:
    """Makes the error for a session that took more than it may while it ran."""
    return error(
        Reason.LIMIT_EXCEEDED,
        f"the session {what}, and it may take at most {limit:,}; do less in one session, or ask "
        "the server's operator for a higher limit",
        limit=name,
        bound=limit,
    )

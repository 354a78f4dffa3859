"""The errors that validation refuses a session with."""

from __future__ import annotations

from insitu_wire.errors import CapacityError, Error, InvalidTraceError, Reason, error


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

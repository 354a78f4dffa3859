"""Sessions that were lost with what ran them, and whether they get another attempt. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.error_codec import from_failure
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_proto.v1.event_pb2 import Event


def was_lost(ending: Event) -> bool:
    """Whether a session ended for the loss of what ran it, and not by its own doing."""
    if not ending.HasField("failure"):
        return False
    return from_failure(ending.failure).reason is Reason.REPLICA_LOST


def why_lost(ending: Event) -> str:
    """Gives why what ran a session was lost, as far as that is known."""
    return from_failure(ending.failure).metadata.get("why", "")


def check_attempts(num_attempts: int, max_attempts: int, why: str = "") -> None:
    """Refuses another attempt at a session that has been lost too often: it may be what kills.

    Args:
        num_attempts: how many there were.
        max_attempts: how many there may be.
        why: how the last of them was lost, if that is known.

    Raises:
        LeaseLostError: REPLICA_LOST.
    """
    if num_attempts >= max_attempts:
        at_last = f" (at last: {why})" if why else ""
        raise error(
            Reason.REPLICA_LOST,
            f"what ran the session was lost in each of {num_attempts} attempts{at_last}, and it is "
            "not run again; see whether it needs more memory than there is",
            numAttempts=num_attempts,
        )

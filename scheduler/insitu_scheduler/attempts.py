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


def check_attempts(num_attempts: int, max_attempts: int) -> None:
    """Refuses another attempt at a session that has been lost too often: it may be what kills.

    Raises:
        LeaseLostError: REPLICA_LOST.
    """
    if num_attempts >= max_attempts:
        raise error(
            Reason.REPLICA_LOST,
            f"what ran the session was lost in each of {num_attempts} attempts, and it is not run "
            "again; see whether it needs more memory than there is",
            numAttempts=num_attempts,
        )

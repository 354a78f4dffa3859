"""Who is let in to wait: places in the queue are bounded, for all and for each user."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from insitu_scheduler.events import shutting_down
from insitu_scheduler.refusals import queue_full, quota_exceeded
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_scheduler.fair_queue import FairQueue


class Intake:
    """Counts who waits or is about to, and refuses those for whom there is no room.

    Attributes:
        is_stopping: whether the scheduler stops.
        is_draining: whether it takes no new sessions, by order of an administrator.
    """

    def __init__(self, queue: FairQueue, *, max_queued: int) -> None:
        """Makes it.

        Args:
            queue: where sessions wait.
            max_queued: how many may, of all users.
        """
        self.is_stopping = False
        self.is_draining = False
        self._queue = queue
        self._max_queued = max_queued
        self._num_reserved = 0
        self._num_of_user = Counter[str]()

    def check_open(self) -> None:
        """Refuses what is new once the scheduler stops.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        if self.is_stopping:
            raise shutting_down()

    def check_accepts(self) -> None:
        """Refuses new sessions once the scheduler stops or drains.

        Raises:
            UnavailableError: SHUTTING_DOWN.
        """
        self.check_open()
        if self.is_draining:
            raise error(
                Reason.SHUTTING_DOWN,
                "an administrator has the server take no new sessions; try again later",
            )

    def reserve(self, model: str | None, user: str, max_of_user: float | None = None) -> int:
        """Keeps a place for a session that is about to be accepted, and gives its position.

        Raises:
            CapacityError: QUEUE_FULL, or QUOTA_EXCEEDED if so many of the user wait already.
            UnavailableError: SHUTTING_DOWN.
        """
        self.check_accepts()
        if max_of_user is not None and self._num_of_user[user] >= max_of_user:
            raise quota_exceeded(int(max_of_user))
        if len(self._queue) + self._num_reserved >= self._max_queued:
            raise queue_full(self._max_queued)
        self._num_reserved += 1
        self.count(user, 1)
        return self._queue.num_ahead(model, user) + self._num_reserved

    def unreserve(self, user: str) -> None:
        """Gives a reserved place back, whether or not its session comes."""
        self._num_reserved -= 1
        self.count(user, -1)

    def count(self, user: str, change: int) -> None:
        """Takes note that one more of a user's sessions waits, or one less."""
        self._num_of_user[user] += change
        if not self._num_of_user[user]:
            del self._num_of_user[user]

"""Whether a round waits for sessions that are about to come. Pure: times are arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class Gathering:
    """After a round in which several sessions have ended, their users are likely to come again.

    The first to come back would have a pass of its own, and the others would wait for that. So a
    round that begins soon after such a one waits until as many have come, and no longer than that
    one took. A session that comes alone, or after a pause, does not wait; nor does anybody wait
    beside one whose user had no part in that round, and owes the others nothing.
    """

    def __init__(self, max_seconds: float = 0.2) -> None:
        """Begins with nobody expected.

        Args:
            max_seconds: how long a round waits at most.
        """
        self._max_seconds = max_seconds
        self._num_expected = 0
        self._expected: frozenset[str] = frozenset()
        self._until = 0.0

    def ended(self, users: Collection[str], *, seconds: float, now: float) -> None:
        """Takes note of a round after which no session is left.

        Args:
            users: of the sessions that it had, one a session.
            seconds: how long it took.
            now: when it ended.
        """
        self._num_expected = len(users)
        self._expected = frozenset(users)
        self._until = now + min(seconds, self._max_seconds)

    def seconds_left(self, users: Collection[str], *, now: float) -> float:
        """Gives how long the next round waits for more sessions than are there.

        Args:
            users: of those that are there, one a session.
            now: the time.
        """
        if len(users) >= self._num_expected or not self._expected.issuperset(users):
            return 0.0
        return max(self._until - now, 0.0)

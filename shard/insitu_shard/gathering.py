"""Whether a round waits for sessions that are about to come. Pure: times are arguments."""

from __future__ import annotations


class Gathering:
    """After a round in which several sessions have ended, their users are likely to come again.

    The first to come back would have a pass of its own, and the others would wait for that. So a
    round that begins soon after such a one waits until as many have come, and no longer than that
    one took. A session that comes alone, or after a pause, does not wait.
    """

    def __init__(self, max_seconds: float = 0.2) -> None:
        """Begins with nobody expected.

        Args:
            max_seconds: how long a round waits at most.
        """
        self._max_seconds = max_seconds
        self._num_expected = 0
        self._until = 0.0

    def ended(self, num_sessions: int, *, seconds: float, now: float) -> None:
        """Takes note of a round after which no session is left.

        Args:
            num_sessions: how many it had.
            seconds: how long it took.
            now: when it ended.
        """
        self._num_expected = num_sessions
        self._until = now + min(seconds, self._max_seconds)

    def seconds_left(self, num_sessions: int, *, now: float) -> float:
        """Gives how long the next round waits for more sessions than are there.

        Args:
            num_sessions: how many are there.
            now: the time.
        """
        is_complete = num_sessions >= self._num_expected
        return 0.0 if is_complete else max(self._until - now, 0.0)

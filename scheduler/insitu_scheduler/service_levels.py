"""How long people wait, and how evenly they are served: what administrators look at. Pure."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

WINDOW_SECONDS = 60.0


def expected_wait(
    *, cost_ahead: float, cost_running: float, num_groups: int, has_room: bool
) -> float:
    """Gives the seconds that a new user's session would wait.

    Args:
        cost_ahead: what the sessions are expected to cost that would run before it.
        cost_running: what those are expected to cost that run; on average half of it is to come.
        num_groups: the model's groups; without one the wait has no end that could be known.
        has_room: whether one of them has a free place.
    """
    if not num_groups:
        return math.inf
    if has_room and not cost_ahead:
        return 0.0
    return (cost_ahead + cost_running / 2) / num_groups


class Shares:
    """What each user has had of a model's groups within the last minute."""

    def __init__(self) -> None:
        self._served: deque[tuple[float, str, float]] = deque()

    def add(self, user: str, seconds: float, *, now: float) -> None:
        """Takes note that a user was served."""
        self._served.append((now, user, seconds))
        self._forget(now)

    def fairness(self, busy_since: Mapping[str, float], *, now: float) -> float:
        """Gives Jain's index over the users who have waited all of the window; 1 if all are equal.

        Who waited for a part of it only has had less, and rightly.
        """
        self._forget(now)
        users = [user for user, since in busy_since.items() if since <= now - WINDOW_SECONDS]
        totals: defaultdict[str, float] = defaultdict(float)
        for _, user, seconds in self._served:
            totals[user] += seconds
        shares = [totals[user] for user in users]
        squares = sum(share * share for share in shares)
        return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0

    def _forget(self, now: float) -> None:
        while self._served and self._served[0][0] < now - WINDOW_SECONDS:
            self._served.popleft()

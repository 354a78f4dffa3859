"""How often, and after which pauses, what broke is asked for again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from insitu_wire.errors import Error

# A scheduler that is started again is back within a minute.
MAX_ATTEMPTS = 16
MAX_PAUSE_SECONDS = 5.0

# A stream that the network has lost without a word is asked for again after this time.
MAX_STREAM_SECONDS = 60.0


class Resuming:
    """Counts the attempts since something came last, and waits between them, longer each time."""

    def __init__(self) -> None:
        self._num_failed = 0

    def broke(
        self, why: Error, *, has_gone_on: bool = False, seconds_left: float = MAX_PAUSE_SECONDS
    ) -> None:
        """Takes note that an attempt broke, and waits before the next.

        Args:
            why: what it broke with.
            has_gone_on: whether something had come of it.
            seconds_left: how long to wait at most.

        Raises:
            Error: why, if nothing has come for too many attempts.
        """
        self._num_failed = 1 if has_gone_on else self._num_failed + 1
        if self._num_failed == MAX_ATTEMPTS:
            raise why
        pause = min(0.05 * 2**self._num_failed, MAX_PAUSE_SECONDS, seconds_left)
        time.sleep(max(pause, 0.0))

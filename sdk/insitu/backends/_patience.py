"""Waits outside of a server where it says that waiting helps: for room, or for a model."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from insitu._logging import log_wait
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

_GROWTH = 1.5
_MAX_PAUSE_SECONDS = 60.0


def with_patience(
    attempt: Callable[[], T],
    *,
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Gives what an attempt gives, once there is room for it; each wait is a line of the log.

    Args:
        attempt: asks the server; it may be called again.
        seconds: how long to wait in all.
        sleep: waits.
        clock: tells the time.

    Raises:
        Error: as the attempt, if waiting did not help, or can not.
    """
    deadline, growth = clock() + seconds, 1.0
    while True:
        try:
            return attempt()
        except Error as err:
            if err.retry_after_seconds is None:
                raise
            pause = min(err.retry_after_seconds * growth, _MAX_PAUSE_SECONDS)
            # Not all who wait come back at the same moment.
            pause *= random.uniform(1.0, 1.3)
            left = deadline - clock()
            if pause > left:
                raise
            log_wait(err.message, pause, left)
            sleep(pause)
            growth *= _GROWTH

"""How often, and after which pauses, a stream that broke is asked for again."""

from __future__ import annotations

import time

# A scheduler that is started again is back within a minute.
MAX_RESUMES = 16
MAX_PAUSE_SECONDS = 5.0

# A stream that the network has lost without a word is asked for again after this time.
MAX_STREAM_SECONDS = 60.0


def pause(num_resumes: int, seconds_left: float = MAX_PAUSE_SECONDS) -> None:
    """Waits before a stream is asked for again, the longer the more often nothing came of it.

    Args:
        num_resumes: how often it was, since something came last; above 0.
        seconds_left: how long to wait at most.
    """
    time.sleep(min(0.05 * 2**num_resumes, MAX_PAUSE_SECONDS, seconds_left))

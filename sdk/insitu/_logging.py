"""Shows what happens to a session, through Python's logging."""

from __future__ import annotations

import logging

_logger = logging.getLogger("insitu")


def log_event(session_id: str, kind: str, message: str) -> None:
    """Logs one event of a session; shown on standard error unless the program set up logging."""
    _show_by_default()
    _logger.info("%s - %s: %s", session_id, kind, message)


def log_wait(why: str, seconds: float, left: float) -> None:
    """Logs that a session waits outside of the server, and for how long it will at most."""
    _show_by_default()
    _logger.info("Waiting %.1f s (%.0f s at most): %s", seconds, left, why)


def _show_by_default() -> None:
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        _logger.addHandler(handler)

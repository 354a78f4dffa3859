"""Shows how far loading is: a bar on a terminal, and now and then a line in the log."""

from __future__ import annotations

import io
import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers.utils.logging import set_tqdm_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

LOG_SECONDS = 2.0
LOG_PERCENT = 10.0
MIN_SECONDS = 0.5


@contextmanager
def progress_shown(name: str, *, is_shown: bool = True) -> Iterator[None]:
    """Shows as progress of a model's loading what transformers counts meanwhile.

    Args:
        name: the model's.
        is_shown: false on all ranks but one.
    """

    def bar(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LoggedBar:
        return LoggedBar(name, *args, **{**kwargs, "disable": not is_shown})

    previous = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


class LoggedBar(tqdm):  # type: ignore[type-arg]  # of whatever transformers counts
    """A bar on standard error if that is a terminal, and lines in the log, seconds apart."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        self._name = name
        self._logged_at = time.monotonic()
        self._logged_percent = 0.0
        self._is_terminal = sys.stderr.isatty()
        file = sys.stderr if self._is_terminal else io.StringIO()
        super().__init__(
            *args, **{"file": file, "leave": False, "mininterval": MIN_SECONDS, **kwargs}
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar; tqdm calls it from time to time."""
        self._log_now_and_then()
        if self._is_terminal:
            super().display(msg, pos)

    def _log_now_and_then(self) -> None:
        percent = 100 * self.n / self.total if self.total else 0.0
        now = time.monotonic()
        if now - self._logged_at < LOG_SECONDS or percent - self._logged_percent < LOG_PERCENT:
            return
        self._logged_at, self._logged_percent = now, percent
        _log.info("%s: %s, %.0f%% (%d of %d)", self._name, self.desc, percent, self.n, self.total)

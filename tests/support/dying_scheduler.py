"""Runs a scheduler that is killed, as if with kill -9, the first time that it comes to some point.

    python dying_scheduler.py POINT FUSE ARGUMENTS OF THE SCHEDULER...

FUSE is a file that the point burns, so that the next scheduler lives.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from insitu_scheduler import __main__ as program
from insitu_scheduler.dispatch import Dispatcher
from insitu_scheduler.events import EventBook
from insitu_scheduler.journal import Journal
from insitu_scheduler.results import ResultStore, ResultWriter

if TYPE_CHECKING:
    from collections.abc import Callable


class Point(StrEnum):
    """Where it is killed."""

    NONE = "nowhere"
    BEFORE_ACCEPTANCE = "before a session is in the journal"
    AFTER_ACCEPTANCE = "before the client knows that it is"
    ENQUEUED = "before the client knows that it waits"
    BEFORE_EVENT = "before an event is in the journal"
    AFTER_EVENT = "after an event is in the journal"
    SAVING = "while a value comes in"
    BEFORE_END = "before the end is in the journal"
    AFTER_END = "before the client knows of the end"
    DOWNLOADING = "while a value goes out"


_POINTS: dict[Point, tuple[type, str, bool]] = {
    Point.BEFORE_ACCEPTANCE: (Journal, "accept", False),
    Point.AFTER_ACCEPTANCE: (Journal, "accept", True),
    Point.ENQUEUED: (Dispatcher, "enqueue", True),
    Point.BEFORE_EVENT: (EventBook, "publish", False),
    Point.SAVING: (ResultWriter, "write", True),
    Point.BEFORE_END: (Journal, "append", False),
    Point.AFTER_END: (Journal, "append", True),
}


def _die(fuse: Path) -> None:
    if fuse.exists():
        fuse.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: type, name: str, fuse: Path, *, is_after: bool) -> None:
    """Has a method die before what it does, or after."""
    method: Callable[..., Any] = getattr(owner, name)

    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_after:
            _die(fuse)
        result = method(self, *args, **kwargs)
        if is_after and not hasattr(result, "__await__"):
            _die(fuse)
        return _then_die(result, fuse) if is_after and hasattr(result, "__await__") else result

    setattr(owner, name, plain)


async def _then_die(result: Any, fuse: Path) -> Any:
    found = await result
    _die(fuse)
    return found


def _die_after_events(fuse: Path) -> None:
    append_later = Journal.append_later

    def append(self: Journal, session_id: Any, event: Any, *, then: Callable[[], None]) -> None:
        append_later(self, session_id, event, then=lambda: (_die(fuse), then())[1])

    Journal.append_later = append  # type: ignore[method-assign]


def _die_while_downloading(fuse: Path) -> None:
    read = ResultStore.read

    async def read_some(self: ResultStore, *args: Any, **kwargs: Any) -> Any:
        async for parts in read(self, *args, **kwargs):
            yield parts
            _die(fuse)

    ResultStore.read = read_some  # type: ignore[method-assign]


def main() -> None:
    """Runs the scheduler."""
    point, fuse = Point(sys.argv[1]), Path(sys.argv[2])
    if point in _POINTS:
        owner, name, is_after = _POINTS[point]
        _wrap(owner, name, fuse, is_after=is_after)
    elif point is Point.AFTER_EVENT:
        _die_after_events(fuse)
    elif point is Point.DOWNLOADING:
        _die_while_downloading(fuse)
    del sys.argv[1:3]
    program.main()


if __name__ == "__main__":
    main()

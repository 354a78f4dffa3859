"""Runs segments of several sessions beside each other: round by round, a step of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_shard.engine.events import Finished, SegmentEvent, StepFollows
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from insitu_shard.engine.segment import SegmentRun


class SegmentPool:
    """The segments that run now.

    Every rank of a group has one. What is added and dropped between rounds, in which order, must be
    the same on all of them, for a round has collectives.
    """

    def __init__(self) -> None:
        """Makes an empty pool."""
        self._running: dict[str, Generator[SegmentEvent | Error | None]] = {}

    def add(self, key: str, run: SegmentRun) -> None:
        """Takes in a segment; it runs from the next round on.

        Args:
            key: names it for as long as it is here.
            run: the segment; it has not been started.
        """
        if key in self._running:
            raise ValueError(f"a segment {key!r} runs already")
        self._running[key] = _told(run)

    def drop(self, key: str) -> None:
        """Ends a segment at once, without a word; one that has ended stays ended."""
        if told := self._running.pop(key, None):
            told.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the segments, in the order in which they were added."""
        return tuple(self._running)

    def __len__(self) -> int:
        """Counts the segments."""
        return len(self._running)

    def round(self) -> Iterator[tuple[str, SegmentEvent | Error]]:
        """Runs one step of each segment, and yields what happens with the segment's key.

        A segment's last event is `Finished`, or the error that it failed with. It is not in the
        pool any more when that is told, and the others do not notice.
        """
        for key, told in list(self._running.items()):
            for event in told:
                if event is None:
                    break
                if isinstance(event, Finished | Error):
                    del self._running[key]
                yield key, event
                if self._running.get(key) is not told:
                    break


def _told(run: SegmentRun) -> Generator[SegmentEvent | Error | None]:
    """Yields all that a segment tells, and None between two steps."""
    has_begun = False
    try:
        for event in run.run():
            if not isinstance(event, StepFollows):
                yield event
            elif has_begun:
                yield None
            else:
                has_begun = True
    except Error as err:
        yield err
    else:
        yield Finished(run.has_exited)

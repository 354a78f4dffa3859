"""Lanes: rows of a pass that one or more traces share.

Traces over equal rows share a lane from the start of the pass to the first write that one makes and
the other does not; there the lane forks. So the lanes of a pass are trees, and a sweep of writes
over all layers is a pass whose batch grows as it descends.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from insitu_shard.compiler.facts import Fork

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from insitu_shard.compiler.facts import Rows, TraceFacts


@dataclass(slots=True)
class Lane:
    """Rows that run through a part of the pass."""

    parent: int | None
    """The lane that it forks from; None if it begins with the pass."""
    rows: Rows
    first: int
    """The moment at which it begins."""
    last: int
    """The last moment at which it is needed."""
    written: int = 0
    """The moment of the last write in it."""
    differs_from: int = 0
    """The first position at which it may not be as the lane that it forks from."""
    start: int = 0
    """The first position that is computed in it."""
    source: int | None = None
    """The lane that has what is before; None if nothing is."""

    @property
    def length(self) -> int:
        """Positions of its longest row."""
        return max(map(len, self.rows))

    def blocks(self, num_blocks: int) -> range:
        """Gives the numbers, from 1, of the blocks that it runs through."""
        first, after = self.first // 2 + self.first % 2, self.last // 2 + 1
        return range(max(first, 1), min(after, num_blocks + 1))


class LaneTree:
    """The lanes of one pass, and which of them each trace runs through.

    Attributes:
        lanes: the lanes.
        paths: the lanes of each trace, by its place, in order.
        traces: the traces that run through each lane.
    """

    def __init__(self, traces: Sequence[TraceFacts]) -> None:
        """Grows the trees.

        Args:
            traces: the traces of the pass.
        """
        self.lanes: list[Lane] = []
        self.paths: list[tuple[int, ...]] = []
        self.traces: list[list[int]] = []
        self._numbers: dict[Hashable, int] = {}
        for trace in traces:
            self._add(trace)
        children: dict[int | None, list[int]] = defaultdict(list)
        for number, lane in enumerate(self.lanes):
            children[lane.parent].append(number)
        self._order = list(_depth_first(children))

    def lane_at(self, trace: int, moment: int) -> int:
        """Gives the lane of a trace, by its place, at a moment."""
        return next(
            number for number in reversed(self.paths[trace]) if self.lanes[number].first <= moment
        )

    def alive(self, moment: int) -> list[int]:
        """Gives the lanes that are needed at a moment, parents before children."""
        return [
            number
            for number in self._order
            if self.lanes[number].first <= moment <= self.lanes[number].last
        ]

    def changes(self) -> set[int]:
        """Gives the ends of parts at which lanes begin, or are no longer needed after."""
        starts = {lane.first for lane in self.lanes if lane.parent is not None}
        # A lane that is last needed inside a part, or at its end, goes at that end.
        return starts | {lane.last | 1 for lane in self.lanes}

    def _add(self, trace: TraceFacts) -> None:
        forks = list(trace.forks)
        key: tuple[Hashable, ...] = (trace.rows,)
        if forks and not forks[0].moment:
            key += (forks.pop(0),)
        path = [self._lane(key, None, trace.rows, Fork(0, None))]
        for fork in forks:
            key += (fork,)
            path.append(self._lane(key, path[-1], trace.rows, fork))
        for number, following in pairwise(path):
            self._need(number, self.lanes[following].first - 1)
        self._need(path[-1], trace.last_moment)
        for number in path:
            self.traces[number].append(len(self.paths))
        self.paths.append(tuple(path))

    def _lane(self, key: Hashable, parent: int | None, rows: Rows, fork: Fork) -> int:
        if key not in self._numbers:
            first, written = fork.moment, max(fork.moment, fork.last)
            self._numbers[key] = len(self.lanes)
            self.lanes.append(Lane(parent, rows, first, first, written, fork.position))
            self.traces.append([])
        return self._numbers[key]

    def _need(self, number: int, moment: int) -> None:
        lane = self.lanes[number]
        lane.last = max(lane.last, moment)


def _depth_first(children: dict[int | None, list[int]]) -> Iterable[int]:
    waiting = list(reversed(children[None]))
    while waiting:
        number = waiting.pop()
        yield number
        waiting.extend(reversed(children[number]))

"""Runs the head on the positions only that someone reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from insitu_shard.compiler import Pass
    from insitu_shard.engine.unchanged import UnchangedLanes

# A product of fewer rows goes another way in the CPU's libraries (MKL: fewer than 12), and its last
# bits differ from those of the same rows among others.
_MIN_POSITIONS = 16


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Where a trace's logits are in what the head gives."""

    row: int
    """The first row, or the first of all chosen positions where the head is trimmed."""
    num_rows: int
    first: int
    """First position of the trace."""
    stride: int
    """Positions that are there of each row; 0 where the head is not trimmed."""
    length: int
    """Positions of the trace."""

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Gives the trace's logits, [rows, positions, vocabulary]."""
        if not self.stride:
            rows = logits.narrow(0, self.row, self.num_rows)
            return torch.narrow(rows, 1, self.first, self.length)
        chosen = logits[0].narrow(0, self.row, self.num_rows * self.stride)
        rows = chosen.unflatten(0, (self.num_rows, self.stride))
        return torch.narrow(rows, 1, self.first, self.length)


class HeadRows:
    """Which positions of which rows the head runs on.

    Attributes:
        is_trimmed: whether those are not all.
    """

    def __init__(self, plan: Pass, is_read_elsewhere: bool) -> None:
        """Looks through the traces.

        Args:
            plan: the pass.
            is_read_elsewhere: whether someone needs all logits.
        """
        self._plan = plan
        self._ranges: dict[int, tuple[int, int]] = {}
        self._starts: dict[int, int] = {}
        read = [trace.head for trace in plan.traces if trace.head is not None]
        is_part = any(
            part != (0, trace.length) for trace in plan.traces if (part := trace.head) is not None
        )
        self.is_trimmed = bool(read) and is_part and not is_read_elsewhere

    def chosen(
        self, hidden: torch.Tensor, first_rows: Mapping[int, int], unchanged: UnchangedLanes
    ) -> torch.Tensor:
        """Gives the hidden states that the head runs on.

        Args:
            hidden: all of them, [rows, length, hidden].
            first_rows: the first row of each lane that is there.
            unchanged: which lanes have become others.

        Returns:
            [1, positions, hidden]
        """
        self._read(unchanged)
        self._widen()
        pieces = []
        position = 0
        for lane, row in first_rows.items():
            if lane in self._ranges:
                first, after = self._ranges[lane]
                num_rows = len(self._plan.tree.lanes[lane].rows)
                rows = hidden.narrow(0, row, num_rows)
                pieces.append(rows.narrow(1, first, after - first).flatten(0, 1))
                self._starts[lane] = position
                position += num_rows * (after - first)
        return torch.cat(pieces).unsqueeze(0)

    def _read(self, unchanged: UnchangedLanes) -> None:
        """Finds the positions that are read of each lane."""
        for place, trace in enumerate(self._plan.traces):
            if trace.head is not None:
                padding = self._plan.padding(trace)
                lane = unchanged.resolved(self._plan.tree.paths[place][-1])
                first, after = (position + padding for position in trace.head)
                known = self._ranges.get(lane, (first, after))
                self._ranges[lane] = (min(known[0], first), max(known[1], after))

    def _widen(self) -> None:
        lanes = self._plan.tree.lanes
        total = sum(
            (after - first) * len(lanes[lane].rows) for lane, (first, after) in self._ranges.items()
        )
        for lane, (first, after) in self._ranges.items():
            if total >= _MIN_POSITIONS:
                return
            before = min(first, _MIN_POSITIONS - total)
            behind = min(self._plan.length - after, _MIN_POSITIONS - total - before)
            self._ranges[lane] = (first - before, after + behind)
            total += (before + behind) * len(lanes[lane].rows)

    def parts(
        self, places: Sequence[int], lanes: Mapping[int, int], first_rows: Mapping[int, int]
    ) -> dict[int, HeadPart]:
        """Gives where each trace's logits are."""
        found = {}
        for place in places:
            trace = self._plan.traces[place]
            padding = self._plan.padding(trace)
            assert trace.head is not None
            first, after = (position + padding for position in trace.head)
            lane = lanes[place]
            row, stride = first_rows[lane], 0
            if self.is_trimmed:
                known = self._ranges[lane]
                row, stride = self._starts[lane], known[1] - known[0]
                first, after = first - known[0], after - known[0]
            found[place] = HeadPart(row, trace.num_rows, first, stride, after - first)
        return found

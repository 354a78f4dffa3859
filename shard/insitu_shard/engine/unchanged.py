"""Lanes whose writes turn out to change nothing: they go on as the lane that they fork from.

A patch of a hidden state from another prompt is such where both prompts begin alike; so is a state
that is restored where nothing has changed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from insitu_shard.compiler import LaneTree
    from insitu_shard.engine.packing import Packing
    from insitu_shard.engine.ranks import Ranks

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnchangedLanes:
    """Which lanes of a pass have become others.

    Attributes:
        moments: the ends of parts at which lanes are looked at.
    """

    def __init__(self, tree: LaneTree) -> None:
        """Begins a pass.

        Args:
            tree: its lanes.
        """
        self._tree = tree
        self._became: dict[int, int] = {}
        self._looked_at: dict[int, list[int]] = {}
        for number, lane in enumerate(tree.lanes):
            if lane.parent is not None and lane.last > lane.written | 1:
                self._looked_at.setdefault(lane.written | 1, []).append(number)
        self.moments = self._looked_at.keys()

    def resolved(self, lane: int) -> int:
        """Gives the lane that has the rows of a lane."""
        while lane in self._became:
            lane = self._became[lane]
        return lane

    def lane_at(self, trace: int, moment: int) -> int:
        """Gives the lane that has a trace's rows at a moment."""
        return self.resolved(self._tree.lane_at(trace, moment))

    def alive(self, moment: int) -> list[int]:
        """Gives the lanes that are needed at a moment."""
        return list(dict.fromkeys(map(self.resolved, self._tree.alive(moment))))

    def there(self, lane: int, first_rows: Container[int]) -> int:
        """Gives the lane that a lane's rows are to be taken from: itself or what it forks from."""
        return lane if lane in first_rows else self._parent(lane)

    def find(
        self,
        moment: int,
        hidden: torch.Tensor,
        packing: Packing,
        first_rows: Mapping[int, int],
        ranks: Ranks,
    ) -> None:
        """Finds the lanes that are to the last bit as the lane that they fork from.

        Args:
            moment: the end of a part.
            hidden: what goes on to the next, after all writes.
            packing: where its positions are.
            first_rows: the first row of each lane that is there.
            ranks: those that have to find the same.
        """
        pairs = [
            (number, parent)
            for number in self._looked_at.get(moment, ())
            if number in first_rows and (parent := self._parent(number)) in first_rows
        ]
        if not pairs:
            return
        ours, theirs = zip(
            *(self._tokens(*pair, packing, first_rows) for pair in pairs), strict=True
        )
        differs = _differ(hidden.flatten(0, 1), torch.cat(ours), torch.cat(theirs))
        parts = differs.split([len(tokens) for tokens in ours])
        for (number, parent), is_other in zip(
            pairs, ranks.highest([int(part.any()) for part in parts]), strict=True
        ):
            if not is_other:
                self._became[number] = parent

    def _parent(self, number: int) -> int:
        parent = self._tree.lanes[number].parent
        assert parent is not None
        return self.resolved(parent)

    def _tokens(
        self, number: int, parent: int, packing: Packing, first_rows: Mapping[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lane = self._tree.lanes[number]
        ours, theirs = (
            packing.tokens[first : first + len(lane.rows), lane.start :].flatten()
            for first in (first_rows[number], first_rows[parent])
        )
        return ours, theirs


def _differ(hidden: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Tells of each token whether a bit of it is other than in its counterpart."""
    bits = hidden.view(_BITS[hidden.element_size()])
    one, other = (bits.index_select(0, at.to(bits.device)) for at in (ours, theirs))
    return (one != other).any(-1).cpu()

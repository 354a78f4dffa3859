"""What a generation has made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from insitu_shard.engine.inputs import Batch


@dataclass(frozen=True, slots=True)
class Made:
    """What a generation has made, when it has ended."""

    token_ids: torch.Tensor
    """Prompts, padded on the left, and what was generated, [rows, length]."""
    num_steps: int
    batch: Batch
    """Which rows are whose."""

    def ids(self, invoke: int) -> torch.Tensor:
        """Gives the ids of an invoke's rows, without the padding that others cause.

        Args:
            invoke: its number, from 1; 0 for all rows.
        """
        rows = self.token_ids[self.batch.slice_of(invoke)]
        return rows[:, self.batch.invokes[invoke - 1].padding :] if invoke else rows

"""Cuts a tensor that has a graph into rows, and joins them again.

The gradient of a view is as large as the whole, and zero but for the view: of n views, n wholes
would be added up. What is cut at once, and joined at once, has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from insitu_shard.engine.inputs import InvokeRows


@dataclass(frozen=True, slots=True)
class RowPieces:
    """The rows of several traces in a tensor, one behind the other in its first dimension."""

    whole: torch.Tensor
    at: Mapping[int, range]
    """Where the rows of each trace are."""
    cut: Mapping[int, torch.Tensor]
    """The traces' rows, if the tensor has a graph."""

    @staticmethod
    def of(
        whole: Any, at: Mapping[int, InvokeRows], *, num_rows: int, length: int
    ) -> RowPieces | None:
        """Cuts a tensor, where gradients are taken; None if its rows can not be cut so.

        Args:
            whole: what the model holds.
            at: the rows of each trace.
            num_rows: how many rows there are.
            length: positions of each.
        """
        are_whole = all(rows.length == length for rows in at.values())
        if not torch.is_grad_enabled() or not isinstance(whole, torch.Tensor) or not are_whole:
            return None
        if not whole.ndim or whole.shape[0] not in (num_rows, num_rows * length):
            return None
        each = whole.shape[0] // num_rows
        places = {
            place: range(rows.first_row * each, (rows.first_row + rows.num_rows) * each)
            for place, rows in at.items()
        }
        pieces = RowPieces(whole, places, {})
        if not whole.requires_grad:
            return pieces
        parts = list(pieces._parts())
        tensors = whole.split([len(rows) for _, rows in parts])
        cut = {place: at for (place, _), at in zip(parts, tensors, strict=True) if place >= 0}
        return RowPieces(whole, places, cut)

    def joined(self, new: Mapping[int, Any]) -> torch.Tensor | None:
        """Gives the tensor with other rows for some traces; None if they do not fit.

        Args:
            new: the rows, by trace.
        """
        fit = (
            isinstance(rows, torch.Tensor)
            and rows.shape == (len(self.at[place]), *self.whole.shape[1:])
            and rows.dtype == self.whole.dtype
            for place, rows in new.items()
        )
        if not all(fit):
            return None
        pieces = [
            new[place] if place in new else self.whole.narrow(0, rows.start, len(rows))
            for place, rows in self._parts()
        ]
        return torch.cat(pieces)

    def _parts(self) -> Iterator[tuple[int, range]]:
        """Yields all rows, one behind the other; those of no trace as -1."""
        after = 0
        for place, rows in sorted(self.at.items(), key=lambda pair: pair[1].start):
            if rows.start > after:
                yield -1, range(after, rows.start)
            yield place, rows
            after = rows.stop
        if after < self.whole.shape[0]:
            yield -1, range(after, self.whole.shape[0])

"""Points: places inside a module where values are shown and changed as if a module stood there.

A point is a module that returns what it is given. It is called only where someone watches it, and
then all that holds for modules holds for it: hooks, shapes, rows, splits over ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


class Point(torch.nn.Module):
    """Stands at a place inside of a module."""

    def __init__(self, shape: str) -> None:
        """Makes a point.

        Args:
            shape: of its value, for people.
        """
        super().__init__()
        self._shape = shape

    @property
    def is_watched(self) -> bool:
        """Whether anyone has hooks on it."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Gives back what it is given."""
        return value

    def extra_repr(self) -> str:
        """Gives the shape."""
        return self._shape


def any_watched(points: Iterable[torch.nn.Module | None]) -> bool:
    """Whether anyone has hooks on one of some points."""
    return any(isinstance(point, Point) and point.is_watched for point in points)

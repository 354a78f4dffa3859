"""Which traces of a session may run now, though those before them have not ended.

What a trace does to the session, its logs, saved values and lists, becomes so in the order of
definition, whenever its pass ran. So a trace may run early if what its pass needs is there and is
not written to by a step that has not ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

NodeId = int

_AHEAD = 4096
"""How far a session is looked through for traces that may run: that happens before each pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStep:
    """A step as the window sees it."""

    is_trace: bool
    defines: frozenset[NodeId] = frozenset()
    """Ids of its values."""
    needs: frozenset[NodeId] = frozenset()
    """Values of earlier steps that its pass can not do without."""
    writes: frozenset[NodeId] = frozenset()
    """Values of earlier steps that it writes into."""
    writes_tensors: bool = False
    """Whether it writes into tensors of earlier steps, which may share memory with others."""
    is_in_order: bool = False
    """Whether its pass itself does what those before and after it can see."""


class Window:
    """Steps that follow each other, and how far each has come."""

    def __init__(self, steps: Sequence[WindowStep]) -> None:
        self._steps = steps
        self._num_ended = 0
        self._early: dict[int, AbstractSet[NodeId]] = {}
        self._definers = {
            node_id: place for place, step in enumerate(steps) for node_id in step.defines
        }
        self._written = frozenset(node_id for step in steps for node_id in step.writes)
        self._tensors_are_written = any(step.writes_tensors for step in steps)

    @property
    def head(self) -> int | None:
        """The place of the first step that has not ended; None if all have."""
        return self._num_ended if self._num_ended < len(self._steps) else None

    def ended(self) -> None:
        """Takes note that the head has ended."""
        self._early.pop(self._num_ended, None)
        self._num_ended += 1

    def ran(self, place: int, values: AbstractSet[NodeId]) -> None:
        """Takes note that a trace's pass has run.

        Args:
            place: the trace's.
            values: ids of what it gave already.
        """
        self._early[place] = values

    def has_run(self, place: int) -> bool:
        """Whether a trace's pass has run."""
        return place in self._early

    def ready(self) -> list[int]:
        """Gives the traces that have not run and may run now."""
        return [
            place
            for place in range(self._num_ended, min(self._num_ended + _AHEAD, len(self._steps)))
            if self._steps[place].is_trace and place not in self._early and self._is_ready(place)
        ]

    def definers(self, place: int) -> frozenset[int]:
        """Gives the places of the steps whose values a trace's pass can not do without."""
        found = (self._definers.get(need) for need in self._steps[place].needs)
        return frozenset(at for at in found if at is not None)

    def is_there(self, node_id: NodeId, place: int) -> bool:
        """Whether a step may use a value of an earlier one before those between have ended."""
        if place == self._num_ended:
            return True
        if self._tensors_are_written or node_id in self._written:
            return False
        definer = self._definers.get(node_id, -1)
        return definer < self._num_ended or node_id in self._early.get(definer, ())

    def _is_ready(self, place: int) -> bool:
        if place == self._num_ended:
            return True
        step = self._steps[place]
        return not step.is_in_order and all(self.is_there(need, place) for need in step.needs)

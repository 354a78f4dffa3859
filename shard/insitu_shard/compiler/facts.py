"""What the compiler must know of a trace to place it in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

Rows = tuple[tuple[int, ...], ...]
"""Token ids of each row."""

GENERATES, GRADIENTS = "generates", "takes gradients"
"""Kinds of traces, for people."""
# The attention takes the time of the longest row for each of them.
_MAX_RATIO = 2


def go_together(one: int, other: int) -> bool:
    """Whether rows of two lengths, each with its own positions only, are worth a common pass."""
    return max(one, other) <= _MAX_RATIO * min(one, other)


class Fork(NamedTuple):
    """A moment from which on a trace's rows are no longer those of traces that write otherwise."""

    moment: int
    writes: Hashable
    """What is written there: equal for traces that write the same."""
    position: int = 0
    """The first position that it may change, here and in all that follows."""
    last: int = 0
    """The moment of the last of the writes, if that is later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFacts:
    """A trace as the planner of passes sees it."""

    rows: Rows
    key: Hashable = None
    """Traces of equal keys may share a pass; None for one that runs alone."""
    kind: str = ""
    """What it does beside a forward pass, which those that it shares one with do too."""
    alone_because: str = ""
    """Why it runs alone, for people."""
    forks: tuple[Fork, ...] = ()
    """Its writes, by moment."""
    last_moment: int = 0
    """The last moment of the pass that it needs."""
    head: tuple[int, int] | None = None
    """First position, and the one after the last, at which it reads the head's output."""
    needs_whole_rows: bool = False
    """Whether it sees what has all positions of a row, and can not be put together from others."""
    fits_other_lengths: bool = False
    """Whether rows of other lengths may be in its pass, each with its own positions only."""
    kept_bytes: int = 0
    """Estimate of what stays in memory until the trace ends."""
    state_bytes: int = 0
    """What of that a trace that generates holds between its passes."""

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(map(len, self.rows))

    @property
    def num_rows(self) -> int:
        """Rows of its batch."""
        return len(self.rows)

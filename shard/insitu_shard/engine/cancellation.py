"""Whether a session is cancelled, as the ranks of a group come to know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Cancellation:
    """One rank hears of it first, in the middle of a pass; all must leave that at one layer."""

    is_asked: bool = False
    """Whether this rank has heard that nobody wants what it still does; set from any thread."""
    is_agreed: bool = False
    """Whether all ranks know, and do nothing more for it."""

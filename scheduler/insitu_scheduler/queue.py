"""A session that waits, as the order in which sessions run may depend on it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

SessionId = NewType("SessionId", str)


@dataclass(frozen=True, slots=True)
class WaitingSession:
    """What an order may depend on."""

    session_id: SessionId
    user: str
    """Whose it is: what fairness is between."""
    model: str | None
    """The model whose groups can take it; None if any group can."""
    estimated_cost: float
    """Seconds of a shard group's time that it is expected to take; above 0."""
    enqueued_at: float
    """When it began to wait, in seconds of the caller's clock."""
    others: frozenset[str] = frozenset()
    """Further models, of which it needs a group each at the same time."""
    lease_id: str | None = None
    """The one group that can take it, for what it keeps; None if any of the model's can."""
    after: frozenset[SessionId] = frozenset()
    """Sessions that must have ended before it runs."""
    is_alone: bool = False
    """Whether nothing may run beside it: what ran it before was lost, perhaps by its own doing."""

    @property
    def models(self) -> list[str | None]:
        """All models in whose lines it waits; None for the line of those that any group can run."""
        return [self.model, *sorted(self.others)]

"""A session that waits, as the order in which sessions run may depend on it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NewType

from insitu_scheduler.terms import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

SessionId = NewType("SessionId", str)


TIER_WEIGHTS: Mapping[Tier, float] = MappingProxyType({tier: tier.weight for tier in Tier})
"""Parts of the time that tiers get while all of them wait: no priorities, so that none starves."""


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
    pins: Mapping[str, str] = field(default_factory=dict)
    """The leases of the groups that alone can take it, by model, for what they keep."""
    after: frozenset[SessionId] = frozenset()
    """Sessions that must have ended before it runs."""
    is_alone: bool = False
    """Whether nothing may run beside it: what ran it before was lost, perhaps by its own doing."""
    tier: Tier = Tier.DEFAULT
    weight: float = 1.0
    """The user's share beside that of other users of the tier; above 0."""
    uploads: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the tensors that it brings, by content hash: it runs best where they are already."""
    handle_bytes: int = 0
    """Memory that its values may take on each rank of a group between its steps; 0 if unbounded."""
    has_begun: bool = False
    """Whether it ran before, has values at the groups of its pins, and goes on there."""

    @property
    def models(self) -> list[str | None]:
        """All models in whose lines it waits; None for the line of those that any group can run."""
        return [self.model, *sorted(self.others)]

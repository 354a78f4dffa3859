"""On which terms a session was accepted: its share of the groups' time, and its bounds. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

from insitu_scheduler.limits import Limits


class Tier(IntEnum):
    """A share of the groups' time; the numbers of `insitu.v1.Tier`, the smaller the less."""

    BATCH = 1
    DEFAULT = 2
    INTERACTIVE = 3

    @property
    def weight(self) -> float:
        """How much it gets beside the other tiers."""
        return {Tier.BATCH: 1.0, Tier.DEFAULT: 4.0, Tier.INTERACTIVE: 8.0}[self]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session may take, kept with it for as long as it may have to be run."""

    tier: Tier = Tier.DEFAULT
    weight: float = 1.0
    """Of its user, beside the other users of the tier."""
    limits: Limits = field(default_factory=Limits)
    traceparent: str = ""
    """Names the client's span, of which the session's own are parts."""
    deadline: float | None = None
    """When it has to have ended, in seconds since 1970; None for no such time."""

    def written(self) -> str:
        """Gives them as text."""
        return json.dumps(
            {
                "tier": self.tier.name,
                "weight": self.weight,
                "limits": self.limits.written(),
                "traceparent": self.traceparent,
                "deadline": self.deadline,
            }
        )

    @classmethod
    def read(cls, text: str) -> Self:
        """Takes them from a text that `written` gave; of an empty one, the defaults."""
        found = json.loads(text) if text else {}
        return cls(
            Tier[found.get("tier", Tier.DEFAULT.name)],
            found.get("weight", 1.0),
            Limits.read(found.get("limits", {})),
            found.get("traceparent", ""),
            found.get("deadline"),
        )


def clamp(requested: int, allowed: Tier) -> Tier:
    """Gives the tier of a session: what was asked for (0: nothing), but no more than is allowed."""
    known = [tier for tier in Tier if tier <= (requested or Tier.DEFAULT)]
    return min(known[-1], allowed)

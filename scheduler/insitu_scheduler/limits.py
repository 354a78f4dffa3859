"""How much one session, or one user, may take. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an API key, or of the whole server; None is no bound."""

    max_waiting_sessions: int | None = None
    """Sessions of the user that may wait at the same time."""
    max_request_bytes: int | None = None
    """Size of a session."""
    max_tokens: int | None = None
    """Tokens that a session takes through its models: those of prompts, and those it generates."""
    max_saved_bytes: int | None = None
    """What a session may save, in bytes."""
    max_handle_bytes: int | None = None
    """What a session's values may take on each rank between its steps, in bytes."""
    max_kept_bytes: int | None = None
    """What the user's values may take on each rank that outlive sessions, in bytes."""
    max_run_seconds: float | None = None
    """How long a session may run, from its dispatch on."""

    def within(self, other: Limits) -> Limits:
        """Gives the smaller of each bound."""
        theirs = asdict(other)
        both = {name: _smaller(bound, theirs[name]) for name, bound in asdict(self).items()}
        return Limits(**both)  # type: ignore[arg-type]

    @classmethod
    def read(cls, values: Mapping[str, object]) -> Self:
        """Takes bounds from where they were written, and refuses others.

        Raises:
            ValueError: a bound that there is not, or that is no number above 0.
        """
        for name, value in values.items():
            if name not in NAMES:
                raise ValueError(f"has the limit {name!r}; there are {', '.join(NAMES)}")
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"has {value!r} as {name}; it must be a number above 0")
        return cls(**values)  # type: ignore[arg-type]

    def written(self) -> dict[str, float]:
        """Gives the bounds that there are, to be written down."""
        return {name: bound for name, bound in asdict(self).items() if bound is not None}


NAMES = tuple(field.name for field in fields(Limits))
"""The names of all bounds."""


def _smaller(one: float | None, other: float | None) -> float | None:
    bounds = [bound for bound in (one, other) if bound is not None]
    return min(bounds, default=None)

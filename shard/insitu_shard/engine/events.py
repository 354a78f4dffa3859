"""What a segment tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.engine.pending import Pending


@dataclass(frozen=True, slots=True)
class TraceStarted:
    """A trace starts."""

    trace_number: int
    """Number of the trace in the session, from 1."""
    num_tokens: int = field(default=0, compare=False)
    """What it takes through the model: its prompts, and each further step that it may generate."""
    seconds: float = field(default=0.0, compare=False)
    """What the segment has taken of the engine's time so far."""


@dataclass(frozen=True, slots=True)
class Logged:
    """The session printed a message."""

    message: str


@dataclass(frozen=True, slots=True)
class TokensChosen:
    """A step of a generation has chosen tokens."""

    trace_number: int
    """Number of the trace in the session, from 1."""
    step: int
    """The step, from 0."""
    token_ids: tuple[int, ...]
    """One of each row."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A value comes back to the user."""

    node_id: int
    """Id of the save node."""
    name: str
    """The user's variable, where it is known."""
    value: object
    """Tensors, numbers, strings, None, and lists, tuples and dicts of these; the receiver's own."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The segment ended well."""

    has_exited: bool
    """Whether session.exit was reached: nothing of the session may run after."""
    seconds: float = field(default=0.0, compare=False)
    """What it took of the engine's time: of passes that it shared, its part."""


@dataclass(frozen=True, slots=True)
class StepFollows:
    """A step that computes comes next. The ranks of a group wait here for each other."""

    pending: Sequence[Pending] = ()
    """Traces that may run now. Whoever drives may run passes of them, and of other sessions'."""


SegmentEvent = TraceStarted | Logged | TokensChosen | Saved | Finished

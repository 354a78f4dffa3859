"""What sessions are expected to cost, learned from what they did cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What a trace costs beside its tokens, in tokens.
_TRACE_TOKENS = 20.0
# Before anything has been measured: of a small model on a small machine.
_PRIOR_SECONDS = 0.001
# Tokens after which what was measured counts as much as what was expected before.
_PRIOR_TOKENS = 200.0
# How much what was measured before a session counts beside it.
_MEMORY = 0.98


@dataclass(frozen=True, slots=True)
class Work:
    """How much a session asks of its models."""

    num_traces: int = 0
    num_tokens: float = 0.0
    """Tokens of all its traces, each as often as it goes through a whole model, or a part of it."""

    @property
    def in_tokens(self) -> float:
        """All of it, in tokens; above 0."""
        return 1.0 + _TRACE_TOKENS * self.num_traces + self.num_tokens


@dataclass(slots=True)
class _Measured:
    tokens: float = _PRIOR_TOKENS
    seconds: float = _PRIOR_TOKENS * _PRIOR_SECONDS


class CostModel:
    """Expects shard-seconds of sessions, for each model apart: seconds a token, lately."""

    def __init__(self) -> None:
        self._models: dict[str | None, _Measured] = {}

    def expect(self, model: str | None, work: Work) -> float:
        """Gives the seconds of a shard group's time that work is expected to take; above 0."""
        measured = self._models.get(model, _Measured())
        return work.in_tokens * measured.seconds / measured.tokens

    def learn(self, model: str | None, work: Work, seconds: float) -> None:
        """Takes in what work did take."""
        measured = self._models.setdefault(model, _Measured())
        measured.tokens = measured.tokens * _MEMORY + work.in_tokens
        measured.seconds = measured.seconds * _MEMORY + seconds

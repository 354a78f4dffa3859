"""The order in which waiting sessions run: fair between users, for each model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

from insitu_scheduler.fair_line import FairLine
from insitu_scheduler.queue import TIER_WEIGHTS
from insitu_scheduler.terms import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_scheduler.queue import SessionId, WaitingSession

T = TypeVar("T")


class FairQueue:
    """A fair line for each model, and one for sessions that any group can run."""

    def __init__(
        self,
        *,
        max_wait_seconds: float = 600.0,
        quantum_seconds: float = 30.0,
        tier_weights: Mapping[Tier, float] = TIER_WEIGHTS,
    ) -> None:
        """Makes an empty queue.

        Args:
            max_wait_seconds: a user who has waited longer for a turn has the next one.
            quantum_seconds: what a turn is charged at most when it begins: whoever has had so much
                gives way to others, or has another turn.
            tier_weights: the tiers' parts of the time.
        """
        self._tier_weights = tier_weights
        self._max_wait_seconds = max_wait_seconds
        self._quantum_seconds = quantum_seconds
        self._waiting: dict[SessionId, WaitingSession] = {}
        self._lines: dict[str | None, FairLine] = {}
        self._num_turns = 0

    def push(self, waiting: WaitingSession, *, is_first: bool = False) -> None:
        """Adds a session to the line of its first model, behind its user's own or before them."""
        self._waiting[waiting.session_id] = waiting
        self._line(waiting.model).push(waiting, is_first=is_first)

    def pop(
        self,
        model: str,
        place: Callable[[WaitingSession], T | None],
        *,
        sated: AbstractSet[str] = frozenset(),
        now: float = 0.0,
    ) -> tuple[WaitingSession, T] | None:
        """Takes out the session that is due next of those that can start on a model's groups.

        Args:
            model: the model.
            place: gives where a session runs; None if it can not start now. Asked in the order in
                which the sessions are due.
            sated: users who get no more of the model's groups now.
            now: the time, on the clock of `enqueued_at`.
        """
        lines = [self._line(model), self._line(None)]
        for line in sorted(lines, key=lambda line: line.last_turn):
            for waiting in line.in_turn(now, sated):
                if (placed := place(waiting)) is not None:
                    self._serve(waiting, line, now)
                    return waiting, placed
        return None

    def settle(self, waiting: WaitingSession, cost: float) -> None:
        """Corrects what a session's user was charged when its turn began: its cost is known now."""
        lines = self._lines_of(waiting)
        for line in lines:
            line.settle(waiting, (cost - self._advance(waiting)) / len(lines))

    def renew(self, waiting: WaitingSession) -> None:
        """Charges a session's user for one more turn, which it has without a break."""
        lines = self._lines_of(waiting)
        for line in lines:
            line.renew(waiting, self._advance(waiting) / len(lines))

    def remove(self, session_id: SessionId) -> WaitingSession | None:
        """Takes out a session that is not to run; None if it does not wait."""
        waiting = self._waiting.pop(session_id, None)
        if waiting is not None:
            self._line(waiting.model).remove(waiting)
        return waiting

    def num_ahead(
        self, model: str | None, user: str, tier: Tier = Tier.DEFAULT, weight: float = 1.0
    ) -> int:
        """Counts the sessions that would run before one that a user sends now for a model."""
        return self._line(model).num_ahead(user, tier, weight)

    def positions(self) -> Iterator[tuple[SessionId, int]]:
        """Gives each session's position, from 1, in the line of its (first) model."""
        for line in self._lines.values():
            yield from zip(line.expected(), itertools.count(1), strict=False)

    def num_waiting(self, model: str | None) -> int:
        """Counts the sessions that wait for a model (None: for any group)."""
        return len(self._line(model))

    def backlog(self, model: str | None) -> float:
        """Gives the seconds that the sessions are expected to take that wait for a model."""
        return self._line(model).backlog

    def cost_ahead(self, model: str | None) -> float:
        """Gives what is expected to be spent on a model before a new user's first session runs."""
        return self._line(model).cost_ahead

    def busy_since(self, model: str | None) -> Mapping[str, float]:
        """Gives the users who wait for a model, and since when they have, without a break."""
        return self._line(model).busy_since

    @property
    def models(self) -> list[str | None]:
        """The models that somebody has waited for."""
        return list(self._lines)

    def oldest(self, model: str | None) -> WaitingSession | None:
        """Gives the session that has waited longest for a model."""
        return self._line(model).oldest

    def waiting_for(self, model: str | None) -> Iterator[WaitingSession]:
        """Yields the sessions in whose line a model is the first, in the order of arrival."""
        yield from self._line(model)

    def waiting(self, model: str | None) -> Iterator[WaitingSession]:
        """Yields the sessions that wait for a model, in the order in which they will run."""
        return (self._waiting[session_id] for session_id in self._line(model).expected())

    def has_others(self, model: str | None, user: str) -> bool:
        """Whether sessions of other users than one wait for a model."""
        return self._line(model).has_others(user) or self._line(None).has_others(user)

    def __contains__(self, session_id: object) -> bool:
        """Whether a session waits."""
        return session_id in self._waiting

    def __len__(self) -> int:
        """Counts all sessions that wait."""
        return len(self._waiting)

    def _serve(self, waiting: WaitingSession, serving: FairLine, now: float) -> None:
        self._num_turns += 1
        serving.last_turn = self._num_turns
        lines = self._lines_of(waiting)
        cost = self._advance(waiting) / len(lines)
        serving.serve(waiting, cost, now=now)
        for line in lines:
            if line is not serving:
                line.charge(waiting, cost)
        del self._waiting[waiting.session_id]

    def _advance(self, waiting: WaitingSession) -> float:
        """Gives what a turn is charged when it begins."""
        return min(waiting.estimated_cost, self._quantum_seconds)

    def _lines_of(self, waiting: WaitingSession) -> list[FairLine]:
        return [self._line(model) for model in waiting.models]

    def _line(self, model: str | None) -> FairLine:
        if model not in self._lines:
            self._lines[model] = FairLine(
                max_wait_seconds=self._max_wait_seconds, tier_weights=self._tier_weights
            )
        return self._lines[model]

"""The order in which waiting sessions run: fair between users, for each model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from insitu_scheduler.fair_line import FairLine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_scheduler.queue import SessionId, WaitingSession


class FairQueue:
    """A fair line for each model, and one for sessions that any group can run."""

    def __init__(self, *, max_wait_seconds: float = 600.0) -> None:
        """Makes an empty queue.

        Args:
            max_wait_seconds: a user who has waited longer for a turn has the next one.
        """
        self._max_wait_seconds = max_wait_seconds
        self._waiting: dict[SessionId, WaitingSession] = {}
        self._lines: dict[str | None, FairLine] = {}
        self._num_turns = 0

    def push(self, waiting: WaitingSession) -> None:
        """Adds a session to the lines of all models that it needs."""
        self._waiting[waiting.session_id] = waiting
        for line in self._lines_of(waiting):
            line.push(waiting)

    def pop(
        self,
        model: str,
        free: AbstractSet[str],
        lease_id: str | None = None,
        *,
        live: AbstractSet[SessionId] = frozenset(),
        sated: AbstractSet[str] = frozenset(),
        is_empty: bool = True,
        now: float = 0.0,
    ) -> WaitingSession | None:
        """Takes out the session that is due next of those that a group of a model can run.

        Args:
            model: the group's.
            free: models of which a group is free, the group's own among them.
            lease_id: the group's.
            live: sessions that have not ended.
            sated: users who get no more of the group now.
            is_empty: whether the group runs nothing.
            now: the time, on the clock of `enqueued_at`.

        A session that needs several models is not overtaken once it is due in the line of one of
        them, else it might never find all of them free. It waits for running sessions only, which
        end: no two such sessions keep each other's groups. So it is with one that runs alone.
        """
        lines = [self._line(model), self._line(None)]
        for line in sorted(lines, key=lambda line: line.last_turn):
            for waiting in line.in_turn(now):
                if waiting.user in sated or not _may_run(waiting, lease_id, live):
                    continue
                if waiting.others and not waiting.others | {waiting.model or model} <= free:
                    return None
                if waiting.is_alone and not is_empty:
                    return None
                self._serve(waiting, line, now)
                return waiting
        return None

    def settle(self, waiting: WaitingSession, cost: float) -> None:
        """Corrects what a session's user was charged when it ran, now that its cost is known."""
        lines = self._lines_of(waiting)
        for line in lines:
            line.settle(waiting.user, (cost - waiting.estimated_cost) / len(lines))

    def remove(self, session_id: SessionId) -> WaitingSession | None:
        """Takes out a session that is not to run; None if it does not wait."""
        waiting = self._waiting.pop(session_id, None)
        if waiting is not None:
            for line in self._lines_of(waiting):
                line.remove(waiting)
        return waiting

    def num_ahead(self, model: str | None, user: str) -> int:
        """Counts the sessions that would run before one that a user sends now for a model."""
        return self._line(model).num_ahead(user)

    def positions(self) -> Iterator[tuple[SessionId, int]]:
        """Gives each session's position, from 1, in the line of its (first) model."""
        for model, line in self._lines.items():
            own = (at for at in line.expected() if self._waiting[at].model == model)
            yield from zip(own, itertools.count(1), strict=False)

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
        """Yields the sessions that wait for a model, in the order of arrival."""
        yield from self._line(model)

    def __len__(self) -> int:
        """Counts all sessions that wait."""
        return len(self._waiting)

    def _serve(self, waiting: WaitingSession, serving: FairLine, now: float) -> None:
        self._num_turns += 1
        serving.last_turn = self._num_turns
        lines = self._lines_of(waiting)
        cost = waiting.estimated_cost / len(lines)
        for line in lines:
            take = line.serve if line is serving else line.charge
            take(waiting, cost, now=now)
        del self._waiting[waiting.session_id]

    def _lines_of(self, waiting: WaitingSession) -> list[FairLine]:
        return [self._line(model) for model in waiting.models]

    def _line(self, model: str | None) -> FairLine:
        if model not in self._lines:
            self._lines[model] = FairLine(max_wait_seconds=self._max_wait_seconds)
        return self._lines[model]


def _may_run(waiting: WaitingSession, lease_id: str | None, live: AbstractSet[SessionId]) -> bool:
    return waiting.lease_id in (None, lease_id) and waiting.after.isdisjoint(live)

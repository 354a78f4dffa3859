"""The order in which waiting sessions run. Pure: the dispatcher owns one and asks it."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

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
    """Expected cost, in units that compare between sessions."""
    enqueued_at: float
    """When it began to wait, in seconds of the caller's clock."""
    others: frozenset[str] = frozenset()
    """Further models, of which it needs a group each at the same time."""
    lease_id: str | None = None
    """The one group that can take it, for what it keeps; None if any of the model's can."""
    after: frozenset[SessionId] = frozenset()
    """Sessions that must have ended before it runs."""


class SessionQueue(Protocol):
    """Holds sessions that wait, and says which is next."""

    def push(self, waiting: WaitingSession) -> None:
        """Adds a session."""
        ...

    def pop(
        self,
        model: str,
        free: AbstractSet[str],
        lease_id: str | None = None,
        *,
        live: AbstractSet[SessionId] = frozenset(),
    ) -> WaitingSession | None:
        """Takes out the next session that a group of a model can run, if there is one.

        Args:
            model: the group's.
            free: models of which a group is free, the group's own among them.
            lease_id: the group's.
            live: sessions that have not ended.
        """
        ...

    def remove(self, session_id: SessionId) -> WaitingSession | None:
        """Takes out a session that is not to run; None if it does not wait."""
        ...

    def num_ahead(self, model: str | None) -> int:
        """Counts the sessions that a newcomer for a model would find before it."""
        ...

    def positions(self) -> Iterator[tuple[SessionId, int]]:
        """Gives each session's position, from 1, among those that compete for its groups."""
        ...

    def num_waiting(self, model: str | None) -> int:
        """Counts the sessions that wait for exactly this model (None: for any group)."""
        ...

    def oldest(self, model: str | None) -> WaitingSession | None:
        """Gives the session of a model that has waited longest."""
        ...

    def __len__(self) -> int:
        """Counts all sessions that wait."""
        ...


class FifoQueue:
    """First come, first served, for each model; a session for any model takes its turn in all."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[SessionId, tuple[int, WaitingSession]] = OrderedDict()
        self._lines: defaultdict[str | None, OrderedDict[SessionId, int]] = defaultdict(OrderedDict)
        self._wide: OrderedDict[SessionId, int] = OrderedDict()
        self._num_pushed = 0

    def push(self, waiting: WaitingSession) -> None:
        """Adds a session at the end."""
        self._num_pushed += 1
        self._waiting[waiting.session_id] = (self._num_pushed, waiting)
        self._lines[waiting.model][waiting.session_id] = self._num_pushed
        if waiting.others:
            self._wide[waiting.session_id] = self._num_pushed

    def pop(
        self,
        model: str,
        free: AbstractSet[str],
        lease_id: str | None = None,
        *,
        live: AbstractSet[SessionId] = frozenset(),
    ) -> WaitingSession | None:
        """Takes out the earliest session that a group of a model can run.

        A session that needs several models is not overtaken in any of their lines: else it might
        never find all of them free. All lines have one order, so that no two such sessions keep
        each other's groups.
        """
        heads = [self._first(key, lease_id, live) for key in (model, None)]
        heads.append(self._first_wide(model, live))
        found = [head for head in heads if head is not None]
        if not found:
            return None
        session_id, _ = min(found, key=lambda head: head[1])
        _, first = self._waiting[session_id]
        if first.others and not first.others | {first.model or model} <= free:
            return None
        return self.remove(session_id)

    def _first(
        self, model: str | None, lease_id: str | None, live: AbstractSet[SessionId]
    ) -> tuple[SessionId, int] | None:
        """Gives the first of a line that needs no other group than the given one, and may run."""
        fitting = (
            (session_id, number)
            for session_id, number in self._lines[model].items()
            if self._waiting[session_id][1].lease_id in (None, lease_id)
            and self._waiting[session_id][1].after.isdisjoint(live)
        )
        return next(fitting, None)

    def _first_wide(self, model: str, live: AbstractSet[SessionId]) -> tuple[SessionId, int] | None:
        needing = (
            (session_id, number)
            for session_id, number in self._wide.items()
            if model in self._waiting[session_id][1].others
            and self._waiting[session_id][1].after.isdisjoint(live)
        )
        return next(needing, None)

    def remove(self, session_id: SessionId) -> WaitingSession | None:
        """Takes out a session; None if it does not wait."""
        if session_id not in self._waiting:
            return None
        _, waiting = self._waiting.pop(session_id)
        del self._lines[waiting.model][session_id]
        self._wide.pop(session_id, None)
        return waiting

    def num_ahead(self, model: str | None) -> int:
        """Counts the sessions that a newcomer for a model would find before it."""
        if model is None:
            return len(self)
        return self.num_waiting(model) + self.num_waiting(None)

    def positions(self) -> Iterator[tuple[SessionId, int]]:
        """Gives each session's position, in one pass over the queue."""
        ahead: Counter[str | None] = Counter()
        for total, (session_id, (_, waiting)) in enumerate(self._waiting.items()):
            before = total if waiting.model is None else ahead[waiting.model] + ahead[None]
            yield session_id, before + 1
            ahead[waiting.model] += 1

    def num_waiting(self, model: str | None) -> int:
        """Counts the sessions that wait for exactly this model."""
        return len(self._lines[model]) if model in self._lines else 0

    def oldest(self, model: str | None) -> WaitingSession | None:
        """Gives the session of a model that has waited longest."""
        session_id = next(iter(self._lines.get(model, ())), None)
        return self._waiting[session_id][1] if session_id is not None else None

    def __len__(self) -> int:
        """Counts all sessions that wait."""
        return len(self._waiting)

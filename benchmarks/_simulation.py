"""The scheduler's queue, registry and placement on a virtual clock, with groups that may die."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from insitu_scheduler.placement import Placement
from insitu_scheduler.queue import SessionId, WaitingSession
from insitu_scheduler.registry import LeaseId, Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.registry import Group

MODEL = "m"


@dataclass(frozen=True)
class Arrival:
    at: float
    user: str
    traces: tuple[float, ...]
    """What each trace of the session really costs, in seconds."""


class Fifo:
    """First come, first served, each session to its end: what the scheduler is compared with."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, WaitingSession] = OrderedDict()

    def push(self, waiting: WaitingSession, *, is_first: bool = False) -> None:
        self._waiting[waiting.session_id] = waiting

    def pop(self, model: str, place: Callable[[WaitingSession], Any], **options: object) -> Any:
        for name, waiting in self._waiting.items():
            if placed := place(waiting):
                del self._waiting[name]
                return waiting, placed
        return None

    def settle(self, waiting: WaitingSession, cost: float) -> None:
        pass

    def renew(self, waiting: WaitingSession) -> None:
        pass

    def has_others(self, model: str, user: str) -> bool:
        return False


class Faults:
    """When which of the groups dies: it is back after five seconds."""

    def __init__(self, seed: int, *, every: float) -> None:
        self._rng = random.Random(seed)
        self._every = every

    def next_at(self, now: float) -> float:
        return now + self._rng.expovariate(1 / self._every)

    def choose(self, groups: list[Group]) -> Group:
        return self._rng.choice(groups)


@dataclass
class _Session:
    user: str
    traces: tuple[float, ...]
    group: Group | None = None
    turn: WaitingSession | None = None
    num_done: int = 0
    spent: float = 0.0
    """Seconds since its turn began."""
    spent_here: float = 0.0
    """Seconds since it last got a place."""
    run: int = 0
    """Raised when it leaves its group: what was planned before does not happen."""


@dataclass
class Outcome:
    waits: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Each user's waits, from the arrival of a session to its first start."""
    num_ended: int = 0
    num_yields: int = 0
    num_losses: int = 0


class Simulation:
    def __init__(
        self,
        queue: Fifo | FairQueue,
        arrivals: list[Arrival],
        seed: int,
        *,
        num_replicas: int = 2,
        quantum: float | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._queue, self._quantum, self._faults = queue, quantum, faults
        self._rng = random.Random(seed)
        self._registry = Registry(ttl_seconds=1e9)
        self._placement = Placement(self._registry)
        self._lease_ids = map(str, itertools.count())
        self._sessions: dict[SessionId, _Session] = {}
        self._live: set[SessionId] = set()
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_left = len(arrivals)
        self._outcome = Outcome()
        for _ in range(num_replicas):
            self._grant(0.0)
        for arrival in arrivals:
            self._at(arrival.at, lambda now, arrival=arrival: self._arrive(arrival, now))
        if faults is not None:
            self._at(faults.next_at(0.0), self._die)

    def run(self) -> Outcome:
        """Runs until all sessions have ended; nothing may be lost, run twice or be left over."""
        while self._num_left:
            now, _, happen = heapq.heappop(self._due)
            happen(now)
            self._match(now)
        assert not self._live
        assert self._outcome.num_ended == len(self._sessions)
        assert all(group.is_empty and not group.expected_seconds for group in self._registry)
        return self._outcome

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), happen))

    def _grant(self, now: float) -> None:
        name = next(self._lease_ids)
        self._registry.grant(
            LeaseId(name), group_id=name, model=MODEL, address="x", num_ranks=1, max_sessions=1,
            now=now,
        )  # fmt: skip

    def _arrive(self, arrival: Arrival, now: float) -> None:
        session_id = SessionId(str(len(self._sessions)))
        self._sessions[session_id] = _Session(arrival.user, arrival.traces)
        self._live.add(session_id)
        expected = sum(arrival.traces) * self._rng.lognormvariate(0, 0.5)
        self._queue.push(WaitingSession(session_id, arrival.user, MODEL, expected, now))

    def _match(self, now: float) -> None:
        while any(self._place_one(model, now) for model in self._registry.ready_models()):
            pass

    def _place_one(self, model: str, now: float) -> bool:
        found = self._queue.pop(
            model,
            lambda waiting: self._placement.groups_for(waiting, model, self._live),
            sated=self._placement.sated(model),
            now=now,
        )
        if found is None:
            return False
        waiting, groups = found
        session = self._sessions[waiting.session_id]
        if not session.run:
            self._outcome.waits[session.user].append(now - waiting.enqueued_at)
        if session.group is None:
            session.group = groups[MODEL]
            self._registry.pin(session.group, waiting.estimated_cost)
        self._registry.take(session.group, session.user, is_alone=waiting.is_alone)
        session.turn, session.run = waiting, session.run + 1
        session.spent = session.spent_here = 0.0
        self._begin_trace(waiting.session_id, now)
        return True

    def _begin_trace(self, session_id: SessionId, now: float) -> None:
        session = self._sessions[session_id]
        cost, run = session.traces[session.num_done], session.run
        self._at(now + cost, lambda then: self._end_trace(session_id, run, cost, then))

    def _end_trace(self, session_id: SessionId, run: int, cost: float, now: float) -> None:
        session = self._sessions[session_id]
        if run != session.run:
            return
        session.num_done += 1
        session.spent += cost
        session.spent_here += cost
        if session.num_done == len(session.traces):
            self._leave(session_id)
            self._live.remove(session_id)
            self._num_left -= 1
            self._outcome.num_ended += 1
        elif self._is_over(session):
            self._yield(session_id, now)
        else:
            self._renew(session)
            self._begin_trace(session_id, now)

    def _is_over(self, session: _Session) -> bool:
        assert session.turn is not None
        if self._quantum is None or session.turn.is_alone or session.spent_here < self._quantum:
            return False
        return self._queue.has_others(MODEL, session.user)

    def _renew(self, session: _Session) -> None:
        if self._quantum is None or session.spent < self._quantum:
            return
        assert session.turn is not None
        self._queue.settle(session.turn, session.spent)
        session.turn = replace(session.turn, estimated_cost=self._quantum)
        self._queue.renew(session.turn)
        session.spent = 0.0

    def _yield(self, session_id: SessionId, now: float) -> None:
        session = self._sessions[session_id]
        group, turn = session.group, session.turn
        assert group is not None
        assert turn is not None
        assert self._quantum is not None
        self._queue.settle(turn, session.spent)
        self._registry.free(group, session.user)
        session.turn, session.run = None, session.run + 1
        self._outcome.num_yields += 1
        again = replace(
            turn, pins={MODEL: group.lease_id}, has_begun=True, enqueued_at=now,
            estimated_cost=max(turn.estimated_cost - session.spent, self._quantum),
        )  # fmt: skip
        self._queue.push(again, is_first=True)

    def _leave(self, session_id: SessionId) -> None:
        """Gives up what a session has of its group, which may be gone."""
        session = self._sessions[session_id]
        group, turn = session.group, session.turn
        assert group is not None
        if turn is not None:
            self._queue.settle(turn, session.spent)
            self._registry.free(group, session.user)
        pinned = group.expected_seconds if group.num_pinned == 1 else 0.0
        self._registry.unpin(group, pinned)
        session.group, session.turn, session.run = None, None, session.run + 1

    def _die(self, now: float) -> None:
        faults = self._faults
        assert faults is not None
        self._at(faults.next_at(now), self._die)
        if not (groups := self._registry.of(MODEL)):
            return
        group = faults.choose(groups)
        self._registry.revoke(group.lease_id)
        self._at(now + 5.0, self._grant)
        for session_id in list(self._live):
            session = self._sessions[session_id]
            if session.group is group:
                self._lose(session_id, now)

    def _lose(self, session_id: SessionId, now: float) -> None:
        session = self._sessions[session_id]
        has_yielded = session.turn is None
        if has_yielded:
            self._queue.remove(session_id)
        self._leave(session_id)
        session.num_done = 0
        self._outcome.num_losses += 1
        expected = sum(session.traces) * self._rng.lognormvariate(0, 0.5)
        self._queue.push(
            WaitingSession(session_id, session.user, MODEL, expected, now, is_alone=not has_yielded)
        )

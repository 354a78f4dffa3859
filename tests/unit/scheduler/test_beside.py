"""Sessions beside each other: a newcomer waits for a turn of each of the others at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.placement import Placement
from insitu_scheduler.queue import SessionId, WaitingSession
from insitu_scheduler.registry import LeaseId, Registry
from insitu_shard.engine.turns import Turns

MODEL = "m"
QUANTUM = 30.0
TRACE = 1.0
Sessions = list[list[int]]
"""Of each user, how many traces each session has."""


@dataclass
class _Session:
    num_left: int
    turn: WaitingSession
    has_started: bool = False
    seconds: float = 0.0
    """Since it got its place."""


class _Group:
    """A group as the dispatcher and the engine run it: a trace at a time, and none shared."""

    def __init__(self, num_places: int) -> None:
        self.now = 0.0
        self._queue = FairQueue(quantum_seconds=QUANTUM)
        self._registry = Registry(ttl_seconds=1e9)
        self._placement = Placement(self._registry)
        self._turns = Turns()
        self._sessions: dict[SessionId, _Session] = {}
        self._running: list[SessionId] = []
        self._group = self._registry.grant(
            LeaseId("1"), group_id="g", model=MODEL, address="x", num_ranks=1,
            max_sessions=num_places, now=0,
        )  # fmt: skip

    def submit(self, user: str, num_traces: int) -> SessionId:
        session_id = SessionId(f"{user} {len(self._sessions)}")
        waiting = WaitingSession(session_id, user, MODEL, num_traces * TRACE, self.now)
        self._sessions[session_id] = _Session(num_traces, waiting)
        self._queue.push(waiting)
        self._match()
        return session_id

    def has_started(self, session_id: SessionId) -> bool:
        return self._sessions[session_id].has_started

    def run(self) -> None:
        """Runs a trace of the session whose turn it is."""
        self.now += TRACE
        if not self._running:
            return
        session_id = self._turns.order(self._running)[0]
        session = self._sessions[session_id]
        self._turns.took(session_id)
        self._turns.charge(session_id, TRACE)
        session.num_left -= 1
        session.seconds += TRACE
        user = session.turn.user
        if not session.num_left:
            self._leave(session_id)
            self._registry.unpin(self._group, session.turn.estimated_cost)
        elif session.seconds >= QUANTUM and self._queue.has_others(MODEL, user):
            self._leave(session_id)
            left = max(session.num_left * TRACE, QUANTUM)
            again = replace(
                session.turn, pins={MODEL: self._group.lease_id}, has_begun=True,
                enqueued_at=self.now, estimated_cost=left,
            )  # fmt: skip
            self._queue.push(again, is_first=True)
        self._match()

    def _leave(self, session_id: SessionId) -> None:
        session = self._sessions[session_id]
        self._queue.settle(session.turn, session.seconds)
        self._registry.free(self._group, session.turn.user)
        self._turns.remove(session_id)
        self._running.remove(session_id)

    def _match(self) -> None:
        live = {at for at, session in self._sessions.items() if session.num_left}
        while self._registry.ready_models():
            found = self._queue.pop(
                MODEL,
                lambda waiting: self._placement.groups_for(waiting, MODEL, live),
                sated=self._placement.sated(MODEL),
                now=self.now,
            )
            if found is None:
                return
            session = self._sessions[found[0].session_id]
            if not session.has_started:
                self._registry.pin(self._group, found[0].estimated_cost)
            session.turn, session.has_started, session.seconds = found[0], True, 0.0
            self._registry.take(self._group, session.turn.user)
            self._turns.add(session.turn.session_id, session.turn.user)
            self._running.append(session.turn.session_id)


@given(
    there=st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=6), min_size=1, max_size=9),
    num_places=st.sampled_from([1, 4, 5, 16]),
    comes_at=st.integers(0, 300),
)
@example(there=[[200] * 6] * 2, num_places=4, comes_at=1)
@example(there=[[200] * 6] * 8, num_places=16, comes_at=1)
@settings(max_examples=60, deadline=None)
def test_who_comes_waits_for_a_turn_of_each_of_the_others_at_most(
    there: Sessions, num_places: int, comes_at: int
) -> None:
    """As with one place, where all others have their turns alone, before the newcomer at worst."""
    group = _Group(num_places)
    for round_of in range(max(map(len, there))):
        for number, lengths in enumerate(there):
            if round_of < len(lengths):
                group.submit(f"user {number}", lengths[round_of])
    while group.now < comes_at:
        group.run()
    came_at, new = group.now, group.submit("newcomer", 1)
    while not group.has_started(new):
        group.run()
    # The last trace of each may take it beyond its quantum.
    assert group.now - came_at <= len(there) * (QUANTUM + TRACE) + TRACE

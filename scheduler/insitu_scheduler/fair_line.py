"""Fair turns between the users who wait for one model. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from insitu_scheduler.queue import SessionId, WaitingSession


@dataclass(slots=True)
class _Share:
    """What one user has had of the line, and what waits."""

    tag: float
    """When the user's next session is due, on the line's clock."""
    turn: int
    """Breaks ties: who was served longer ago comes first."""
    waiting: OrderedDict[SessionId, WaitingSession] = field(default_factory=OrderedDict)
    num_running: int = 0


class FairLine:
    """Start-time fair queueing between users, by cost (Goyal, Vin and Cheng, SIGCOMM 1996).

    A session is due at its user's start tag, on a clock that shows the tag of the session served
    last. Being served puts its user's tag off by the session's cost. So users who keep the line
    busy get equal shares of it, whatever they send, and one who was idle starts at the clock: no
    credit is saved up. A user's own sessions keep their order.
    """

    def __init__(self, *, max_wait_seconds: float) -> None:
        """Makes an empty line.

        Args:
            max_wait_seconds: a user who has waited longer since the last turn has the next one,
                whatever the tag says: an estimate that was far off must not lock anybody out.
        """
        self.clock = 0.0
        self.backlog = 0.0
        """What the sessions that wait are expected to cost."""
        self.last_turn = 0
        """Number of the turn, over all lines, in which it was served last."""
        self._max_wait_seconds = max_wait_seconds
        self._shares: dict[str, _Share] = {}
        self._order: SortedList = SortedList()
        # Tags of users who have nothing here, but have had more than their share.
        self._in_debt: SortedList = SortedList()
        self._arrivals: OrderedDict[SessionId, WaitingSession] = OrderedDict()
        # Users by how long they have waited for a turn: longest first.
        self._waits_since: OrderedDict[str, float] = OrderedDict()
        # Since when something of theirs has waited, without a break.
        self._busy_since: dict[str, float] = {}
        self._num_turns = 0

    def push(self, waiting: WaitingSession) -> None:
        """Adds a session behind its user's own."""
        share = self._share(waiting.user)
        self._arrivals[waiting.session_id] = waiting
        self.backlog += waiting.estimated_cost
        share.waiting[waiting.session_id] = waiting
        if len(share.waiting) == 1:
            share.tag = max(share.tag, self.clock)
            self._waits_since[waiting.user] = waiting.enqueued_at
            self._busy_since[waiting.user] = waiting.enqueued_at
            self._order.add((share.tag, share.turn, waiting.user))

    def in_turn(self, now: float) -> Iterator[WaitingSession]:
        """Yields the sessions as they are due, each user's in their own order.

        All of a user's come together: whoever asks takes the first that can run.
        """
        if (longest := next(iter(self._waits_since), None)) and self._is_late(longest, now):
            yield from self._shares[longest].waiting.values()
        for _, _, user in self._order:
            yield from self._shares[user].waiting.values()

    def serve(self, waiting: WaitingSession, cost: float, *, now: float) -> None:
        """Takes out a session that runs from now on, on this line's model, at an expected cost."""
        # Whoever is early by tag but late by age does not put the clock forward for others.
        if not self._is_late(waiting.user, now):
            self.clock = max(self.clock, self._shares[waiting.user].tag)
        self.charge(waiting, cost, now=now)
        while self._in_debt and self._in_debt[0][0] <= self.clock:
            del self._shares[self._in_debt.pop(0)[1]]

    def charge(self, waiting: WaitingSession, cost: float, *, now: float) -> None:
        """Takes out a session that runs from now on, served by another line."""
        self._withdraw(waiting)
        share = self._shares[waiting.user]
        self._num_turns += 1
        share.num_running += 1
        self._move(waiting.user, share, share.tag + cost, turn=self._num_turns)
        if waiting.user in self._waits_since:
            self._waits_since[waiting.user] = now
            self._waits_since.move_to_end(waiting.user)

    def settle(self, user: str, correction: float) -> None:
        """Takes note that a session ended, and that it cost more, or less, than was charged."""
        share = self._shares[user]
        share.num_running -= 1
        self._move(user, share, share.tag + correction, turn=share.turn)
        self._forget_idle(user, share)

    def remove(self, waiting: WaitingSession) -> None:
        """Takes out a session that is not to run."""
        self._withdraw(waiting)
        self._forget_idle(waiting.user, self._shares[waiting.user])

    def num_ahead(self, user: str) -> int:
        """Counts the sessions that would run before one that a user sends now."""
        share = self._shares.get(user)
        own = len(share.waiting) if share else 0
        due = max(share.tag, self.clock) if share else self.clock
        if share:
            due += sum(session.estimated_cost for session in share.waiting.values())
        return own + sum(
            _num_due(other, due)
            for name, other in self._shares.items()
            if name != user and other.waiting
        )

    @property
    def busy_since(self) -> Mapping[str, float]:
        """The users who have sessions here, with the time since when that has been so."""
        return self._busy_since

    @property
    def cost_ahead(self) -> float:
        """What the sessions are expected to cost that would run before a new user's first."""
        due = self.clock
        return sum(
            session.estimated_cost
            for share in self._shares.values()
            for session in itertools.islice(share.waiting.values(), _num_due(share, due))
        )

    def expected(self) -> Iterator[SessionId]:
        """Yields the sessions in the order in which they will run if nothing changes."""
        heads = [(tag, turn, user) for tag, turn, user in self._order]
        rests = {user: iter(self._shares[user].waiting.values()) for _, _, user in heads}
        heapq.heapify(heads)
        number = self._num_turns
        while heads:
            tag, _, user = heapq.heappop(heads)
            session = next(rests[user], None)
            if session is not None:
                yield session.session_id
                number += 1
                heapq.heappush(heads, (tag + session.estimated_cost, number, user))

    @property
    def oldest(self) -> WaitingSession | None:
        """The session that has waited longest."""
        return next(iter(self._arrivals.values()), None)

    @property
    def num_users(self) -> int:
        """Counts the users whom the line remembers."""
        return len(self._shares)

    def __iter__(self) -> Iterator[WaitingSession]:
        """Yields the sessions that wait, in the order of arrival."""
        return iter(list(self._arrivals.values()))

    def __len__(self) -> int:
        """Counts the sessions that wait."""
        return len(self._arrivals)

    def _is_late(self, user: str, now: float) -> bool:
        return now - self._waits_since[user] > self._max_wait_seconds

    def _share(self, user: str) -> _Share:
        if user not in self._shares:
            self._shares[user] = _Share(self.clock, self._num_turns)
        share = self._shares[user]
        self._in_debt.discard((share.tag, user))
        return share

    def _withdraw(self, waiting: WaitingSession) -> None:
        share = self._shares[waiting.user]
        del self._arrivals[waiting.session_id]
        # Nothing waits: nothing is left of rounding, either.
        self.backlog = self.backlog - waiting.estimated_cost if self._arrivals else 0.0
        del share.waiting[waiting.session_id]
        if not share.waiting:
            self._order.remove((share.tag, share.turn, waiting.user))
            del self._waits_since[waiting.user]
            del self._busy_since[waiting.user]

    def _move(self, user: str, share: _Share, tag: float, *, turn: int) -> None:
        if share.waiting:
            self._order.remove((share.tag, share.turn, user))
            self._order.add((tag, turn, user))
        share.tag, share.turn = tag, turn

    def _forget_idle(self, user: str, share: _Share) -> None:
        """Forgets a user who has nothing here, now or once the clock has caught up."""
        if share.waiting or share.num_running:
            return
        if share.tag <= self.clock:
            del self._shares[user]
        else:
            self._in_debt.add((share.tag, user))


def _num_due(share: _Share, due: float) -> int:
    """Counts a user's sessions that start at or before a tag."""
    tag, count = share.tag, 0
    for session in share.waiting.values():
        if tag > due:
            break
        tag, count = tag + session.estimated_cost, count + 1
    return count

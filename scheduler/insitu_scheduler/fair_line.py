"""Fair turns between those who wait for one model: tiers, in a tier its users. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_scheduler.fair_turns import FairTurns
from insitu_scheduler.queue import TIER_WEIGHTS
from insitu_scheduler.terms import Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from insitu_scheduler.queue import SessionId, WaitingSession

# A position is told for each session that comes: it must not take longer the more users there are.
_MAX_LOOKED_AT = 200


@dataclass(slots=True)
class _Sessions:
    """What waits of one user in one tier, in the user's own order."""

    waiting: OrderedDict[SessionId, WaitingSession] = field(default_factory=OrderedDict)
    backlog: float = 0.0

    def add(self, session: WaitingSession, *, is_first: bool) -> None:
        self.waiting[session.session_id] = session
        if is_first:
            self.waiting.move_to_end(session.session_id, last=False)
        self.backlog += session.estimated_cost

    def remove(self, session: WaitingSession) -> None:
        del self.waiting[session.session_id]
        # Nothing waits: nothing is left of rounding, either.
        self.backlog = self.backlog - session.estimated_cost if self.waiting else 0.0

    def within(self, cost: float) -> int:
        """Counts those that start within a cost, as if all cost the same."""
        if cost < 0 or not self.waiting:
            return 0
        return min(len(self.waiting), int(cost * len(self.waiting) / self.backlog + 1e-9) + 1)

    @property
    def weight(self) -> float:
        return next(iter(self.waiting.values())).weight


@dataclass(slots=True)
class _TierLine:
    turns: FairTurns = field(default_factory=FairTurns)
    users: dict[str, _Sessions] = field(default_factory=dict)
    backlog: float = 0.0
    num_waiting: int = 0


class FairLine:
    """Turns by `FairTurns` between tiers, by their weights, and in a tier between users, by theirs.

    A user's own sessions keep their order.
    """

    def __init__(
        self, *, max_wait_seconds: float, tier_weights: Mapping[Tier, float] = TIER_WEIGHTS
    ) -> None:
        """Makes an empty line.

        Args:
            max_wait_seconds: a user who has waited longer since the last turn has the next one,
                whatever the tag says: an estimate that was far off must not lock anybody out.
            tier_weights: the tiers' parts of the time.
        """
        self.last_turn = 0
        """Number of the turn, over all lines, in which it was served last."""
        self._max_wait_seconds = max_wait_seconds
        self._weights = tier_weights
        self._turns = FairTurns()
        self._tiers = {tier: _TierLine() for tier in tier_weights}
        self._arrivals: OrderedDict[SessionId, WaitingSession] = OrderedDict()
        # Users of tiers by how long they have waited for a turn: longest first.
        self._waits_since: OrderedDict[tuple[Tier, str], float] = OrderedDict()
        # Since when something of theirs has waited, without a break.
        self._busy_since: dict[tuple[Tier, str], float] = {}

    def push(self, waiting: WaitingSession, *, is_first: bool = False) -> None:
        """Adds a session behind its user's own, or before them."""
        tier = self._tiers[waiting.tier]
        self._arrivals[waiting.session_id] = waiting
        if not tier.users:
            self._turns.wait(waiting.tier.name)
        if waiting.user not in tier.users:
            tier.users[waiting.user] = _Sessions()
            tier.turns.wait(waiting.user)
            key = waiting.tier, waiting.user
            self._waits_since[key] = self._busy_since[key] = waiting.enqueued_at
        tier.users[waiting.user].add(waiting, is_first=is_first)
        tier.backlog += waiting.estimated_cost
        tier.num_waiting += 1

    def in_turn(
        self, now: float, sated: AbstractSet[str] = frozenset()
    ) -> Iterator[WaitingSession]:
        """Yields the sessions as they are due, each user's in their own order.

        All of a user's come together: whoever asks takes the first that can run. Those of sated
        users are left out.
        """
        tier_of_late, late = next(iter(self._waits_since), (Tier.DEFAULT, None))
        if late is not None and late not in sated and self._is_late(tier_of_late, late, now):
            yield from self._tiers[tier_of_late].users[late].waiting.values()
        for name in self._turns:
            tier = self._tiers[Tier[name]]
            for user in tier.turns:
                if user not in sated:
                    yield from tier.users[user].waiting.values()

    def serve(self, waiting: WaitingSession, cost: float, *, now: float) -> None:
        """Takes out a session that runs from now on, at an expected cost on this line's model."""
        # Whoever is early by tag but late by age does not put the clock forward for others.
        is_due = not self._is_late(waiting.tier, waiting.user, now)
        self._begin(waiting, cost, is_due=is_due)
        key = waiting.tier, waiting.user
        self._waits_since[key] = now
        self._waits_since.move_to_end(key)
        self.remove(waiting)

    def charge(self, waiting: WaitingSession, cost: float) -> None:
        """Charges a session that another line serves for what it is expected to cost here, too."""
        self._begin(waiting, cost, is_due=False)

    def renew(self, waiting: WaitingSession, cost: float) -> None:
        """Charges a session that goes on, as nobody else waits or may run, for one more turn."""
        self._begin(waiting, cost, is_due=not self.has_others(waiting.user))

    def settle(self, waiting: WaitingSession, correction: float) -> None:
        """Takes note that a session ended, and that it cost more, or less, than was charged."""
        self._turns.end(waiting.tier.name, correction / self._weights[waiting.tier])
        self._tiers[waiting.tier].turns.end(waiting.user, correction / waiting.weight)

    def remove(self, waiting: WaitingSession) -> None:
        """Takes out a session that does not wait any more."""
        tier = self._tiers[waiting.tier]
        del self._arrivals[waiting.session_id]
        tier.users[waiting.user].remove(waiting)
        tier.backlog -= waiting.estimated_cost
        tier.num_waiting -= 1
        if not tier.users[waiting.user].waiting:
            key = waiting.tier, waiting.user
            del tier.users[waiting.user], self._waits_since[key], self._busy_since[key]
            tier.turns.rest(waiting.user)
        if not tier.users:
            tier.backlog = 0.0
            self._turns.rest(waiting.tier.name)

    def num_ahead(self, user: str, tier: Tier = Tier.DEFAULT, weight: float = 1.0) -> int:
        """Counts the sessions that would run before one that a user sends now, as far as is known.

        As if all sessions of a user cost the same: a count over a long queue takes no longer.
        """
        line = self._tiers[tier]
        own = line.users.get(user, _Sessions())
        due = line.turns.tag(user) + own.backlog / weight
        count, cost = self._count_within(line, user, due)
        count, cost = count + len(own.waiting), cost + own.backlog
        due = self._turns.tag(tier.name) + cost / self._weights[tier]
        return count + sum(
            self._num_within(other, due) for other in self._tiers if other is not tier
        )

    @property
    def busy_since(self) -> Mapping[str, float]:
        """The users who have sessions here, with the time since when that has been so."""
        users: dict[str, float] = {}
        for (_, user), since in self._busy_since.items():
            users[user] = min(since, users.get(user, since))
        return users

    @property
    def cost_ahead(self) -> float:
        """What the sessions are expected to cost that would run before a new user's first."""
        line = self._tiers[Tier.DEFAULT]
        _, cost = self._count_within(line, "", line.turns.clock)
        due = self._turns.tag(Tier.DEFAULT.name) + cost / self._weights[Tier.DEFAULT]
        for tier, other in self._tiers.items():
            if tier is not Tier.DEFAULT and (ahead := self._num_within(tier, due)):
                cost += other.backlog * ahead / other.num_waiting
        return cost

    def expected(self) -> Iterator[SessionId]:
        """Yields the sessions in the order in which they will run if nothing changes."""
        tiers = {name: self._expected_of(self._tiers[Tier[name]]) for name in self._turns}
        weights = {tier.name: weight for tier, weight in self._weights.items()}
        for session in _merged(self._turns.tags, tiers, weights):
            yield session.session_id

    @property
    def backlog(self) -> float:
        """What the sessions that wait are expected to cost."""
        return sum(tier.backlog for tier in self._tiers.values())

    @property
    def oldest(self) -> WaitingSession | None:
        """The session that has waited longest."""
        return next(iter(self._arrivals.values()), None)

    @property
    def num_users(self) -> int:
        """Counts the users whom the line remembers."""
        return sum(len(tier.turns) for tier in self._tiers.values())

    def has_others(self, user: str) -> bool:
        """Whether sessions of other users than one wait."""
        names = {name for tier in self._tiers.values() for name in itertools.islice(tier.users, 2)}
        return bool(names - {user})

    def __iter__(self) -> Iterator[WaitingSession]:
        """Yields the sessions that wait, in the order of arrival."""
        return iter(list(self._arrivals.values()))

    def __len__(self) -> int:
        """Counts the sessions that wait."""
        return len(self._arrivals)

    def _begin(self, waiting: WaitingSession, cost: float, *, is_due: bool) -> None:
        tier = self._tiers[waiting.tier]
        self._turns.begin(waiting.tier.name, cost / self._weights[waiting.tier], is_due=is_due)
        tier.turns.begin(waiting.user, cost / waiting.weight, is_due=is_due)

    def _is_late(self, tier: Tier, user: str, now: float) -> bool:
        return now - self._waits_since[tier, user] > self._max_wait_seconds

    def _count_within(self, line: _TierLine, user: str, due: float) -> tuple[int, float]:
        """Counts sessions of other users that start before a tag, and what they cost in all."""
        count, cost = 0, 0.0
        others = [name for name in itertools.islice(line.users, _MAX_LOOKED_AT) if name != user]
        for name in others:
            other = line.users[name]
            ahead = other.within((due - line.turns.tag(name)) * other.weight)
            count += ahead
            cost += other.backlog * ahead / len(other.waiting)
        # As if those who were not looked at were like those who were.
        scale = max((len(line.users) - (user in line.users)) / max(len(others), 1), 1.0)
        return round(count * scale), cost * scale

    def _num_within(self, tier: Tier, due: float) -> int:
        """Counts those of a tier that start before a tag."""
        line = self._tiers[tier]
        count = line.num_waiting
        cost = (due - self._turns.tag(tier.name)) * self._weights[tier]
        if cost < 0 or not count:
            return 0
        return min(count, int(cost * count / line.backlog + 1e-9) + 1)

    def _expected_of(self, tier: _TierLine) -> Iterator[WaitingSession]:
        users = {name: iter(one.waiting.values()) for name, one in tier.users.items()}
        weights = {name: one.weight for name, one in tier.users.items()}
        return _merged(tier.turns.tags, users, weights)


def _merged(
    tags: Iterable[tuple[float, int, str]],
    rests: Mapping[str, Iterator[WaitingSession]],
    weights: Mapping[str, float],
) -> Iterator[WaitingSession]:
    """Yields what each name has, in the order in which the names have their turns."""
    heads = list(tags)
    heapq.heapify(heads)
    number = max((turn for _, turn, _ in heads), default=0)
    while heads:
        tag, _, name = heapq.heappop(heads)
        session = next(rests[name], None)
        if session is not None:
            yield session
            number += 1
            due = tag + session.estimated_cost / weights[name]
            heapq.heappush(heads, (due, number, name))

"""Queue, registry and placement together, whatever comes: nothing is lost, starved or left over."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from insitu_scheduler.fair_line import FairLine
from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.placement import Placement
from insitu_scheduler.queue import TIER_WEIGHTS, SessionId, WaitingSession
from insitu_scheduler.registry import Group, LeaseId, Registry
from insitu_scheduler.terms import Tier

USERS = st.sampled_from(["ann", "bob", "cy"])
MODELS = st.sampled_from(["a", "b", "ab", "ba", ""])
PLACES = 2
MEMORY = 10


@dataclass
class Running:
    waiting: WaitingSession
    groups: dict[str, Group]
    here: str
    has_place: bool = True


class Scheduling(RuleBasedStateMachine):
    """Does what the dispatcher does, without its clock, network and journal."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.registry = Registry(ttl_seconds=10)
        self.placement = Placement(self.registry)
        self.live: dict[SessionId, Running | None] = {}
        self.ended: Counter[SessionId] = Counter()
        self.num_groups = 0
        for model in "aabb":
            self._grant(model)

    def _grant(self, model: str) -> None:
        self.num_groups += 1
        self.registry.grant(
            LeaseId(str(self.num_groups)), group_id=str(self.num_groups), model=model, address="x",
            num_ranks=1, max_sessions=PLACES, now=0, handle_bytes=MEMORY,
        )  # fmt: skip

    @rule(
        user=USERS,
        models=MODELS,
        cost=st.floats(0.1, 50),
        tier=st.sampled_from(list(Tier)),
        weight=st.sampled_from([0.5, 1, 4]),
        handle_bytes=st.sampled_from([0, 3, 6, 20]),
    )
    def submit(
        self, user: str, models: str, cost: float, tier: Tier, weight: float, handle_bytes: int
    ) -> None:
        session_id = SessionId(str(len(self.live)))
        self.live[session_id] = None
        self.queue.push(
            WaitingSession(
                session_id, user, models[:1] or None, cost, 0.0, others=frozenset(models[1:]),
                tier=tier, weight=weight, handle_bytes=handle_bytes,
            )
        )  # fmt: skip
        self._match()

    @precondition(lambda self: self._running())
    @rule(factor=st.floats(0, 5), data=st.data())
    def end(self, factor: float, data: st.DataObject) -> None:
        session_id = data.draw(st.sampled_from(self._running()))
        running = self.live[session_id]
        assert running is not None
        self.queue.settle(running.waiting, running.waiting.estimated_cost * factor)
        self._give_back(running)
        self.ended[session_id] += 1
        self._match()

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def go_on_to_another_model(self, data: st.DataObject) -> None:
        running = self.live[data.draw(st.sampled_from(self._running()))]
        assert running is not None
        there = data.draw(st.sampled_from(sorted(running.groups)))
        if there != running.here and not running.groups[there].is_taken:
            self.registry.free(running.groups[running.here], running.waiting.user)
            running.here = there
            self.registry.take(running.groups[there], running.waiting.user)
            self._match()

    @precondition(lambda self: self._running())
    @rule(data=st.data())
    def use_up_the_quantum(self, data: st.DataObject) -> None:
        session_id = data.draw(st.sampled_from(self._running()))
        running = self.live[session_id]
        assert running is not None
        self.queue.settle(running.waiting, 30.0)
        if running.waiting.is_alone or not self.queue.has_others(
            running.here, running.waiting.user
        ):
            running.waiting = replace(running.waiting, estimated_cost=30.0)
            self.queue.renew(running.waiting)
            return
        self.registry.free(running.groups[running.here], running.waiting.user)
        running.has_place = False
        again = replace(
            running.waiting,
            model=running.here,
            others=frozenset(running.groups) - {running.here},
            pins={model: group.lease_id for model, group in running.groups.items()},
            has_begun=True,
        )
        self.queue.push(again, is_first=True)
        self._match()

    @rule(model=st.sampled_from(["a", "b"]), place=st.integers(0, 1))
    def lose_a_group(self, model: str, place: int) -> None:
        group = self.registry.of(model)[place]
        self.registry.revoke(group.lease_id)
        self._grant(model)
        for session_id in self._begun():
            running = self.live[session_id]
            if running is None or group not in running.groups.values():
                continue
            if running.has_place:
                self.queue.settle(running.waiting, 1.0)
            else:
                self.queue.remove(session_id)
            self._give_back(running)
            self.live[session_id] = None
            again = replace(running.waiting, pins={}, has_begun=False, is_alone=True)
            self.queue.push(again)
        self._match()

    @invariant()
    def nothing_is_lost_or_there_twice(self) -> None:
        for session_id, running in self.live.items():
            has_ended = bool(self.ended[session_id])
            is_running = running is not None and running.has_place and not has_ended
            places = [session_id in self.queue, is_running, has_ended]
            assert places.count(True) == 1

    @invariant()
    def reservations_are_those_of_the_sessions_that_have_begun(self) -> None:
        pinned: Counter[str] = Counter()
        placed: Counter[str] = Counter()
        reserved: defaultdict[str, list[int]] = defaultdict(list)
        for session_id in self._begun():
            running = self.live[session_id]
            assert running is not None
            pinned.update(group.lease_id for group in running.groups.values())
            taken = self._taken(running)
            placed.update(group.lease_id for group in taken)
            for group in running.groups.values():
                reserved[group.lease_id].append(running.waiting.handle_bytes)
        for group in self.registry:
            sizes = [size for size in reserved[group.lease_id] if size]
            assert group.reserved_bytes == sum(sizes)
            assert sum(sizes) <= MEMORY or len(sizes) == 1
            assert group.num_pinned == pinned[group.lease_id]
            assert group.num_sessions == placed[group.lease_id]
            assert abs(group.expected_seconds) < 1e-6 or group.num_pinned

    @invariant()
    def no_group_is_idle_while_a_session_could_start(self) -> None:
        """Those who wait are asked again whenever a group renews its lease."""
        self._match()
        for model in self.registry.ready_models():
            assert not self._could_start(model)

    @invariant()
    def one_that_runs_alone_has_its_groups_for_itself(self) -> None:
        for session_id in self._running():
            running = self.live[session_id]
            assert running is not None
            if running.waiting.is_alone:
                assert all(group.num_sessions == 1 for group in running.groups.values())

    def teardown(self) -> None:
        """At the end all that waits runs, and nothing is left over."""
        while self._unended():
            running = self._running()
            assert running, "nothing runs, and some wait"
            self.end_one(running[0])
        assert len(self.queue) == 0
        assert set(self.ended.values()) <= {1}
        assert all(group.is_empty and not group.expected_seconds for group in self.registry)
        assert not any(group.reserved_bytes for group in self.registry)
        assert not any(self.queue.backlog(model) for model in ("a", "b", None))

    def end_one(self, session_id: SessionId) -> None:
        running = self.live[session_id]
        assert running is not None
        self.queue.settle(running.waiting, 1.0)
        self._give_back(running)
        self.ended[session_id] += 1
        self._match()

    def _match(self) -> None:
        while any(map(self._place_one, self.registry.ready_models())):
            pass

    def _place_one(self, model: str) -> bool:
        live = self._unended()
        found = self.queue.pop(
            model,
            lambda waiting: self.placement.groups_for(waiting, model, live),
            sated=self.placement.sated(model),
        )
        if found is None:
            return False
        waiting, groups = found
        running = self.live[waiting.session_id]
        if running is None:
            running = Running(waiting, groups, here=next(iter(groups)))
            self.live[waiting.session_id] = running
            for group in groups.values():
                self.registry.pin(group, waiting.estimated_cost, waiting.handle_bytes)
        running.waiting, running.has_place = waiting, True
        for group in self._taken(running):
            self.registry.take(group, waiting.user, is_alone=waiting.is_alone)
        return True

    def _could_start(self, model: str) -> list[SessionId]:
        live, found = self._unended(), list[SessionId]()

        def look(waiting: WaitingSession) -> None:
            if self.placement.groups_for(waiting, model, live) is not None:
                found.append(waiting.session_id)

        self.queue.pop(model, look, sated=self.placement.sated(model))
        return found

    def _taken(self, running: Running) -> list[Group]:
        if not running.has_place:
            return []
        if running.waiting.is_alone:
            return list(running.groups.values())
        return [running.groups[running.here]]

    def _give_back(self, running: Running) -> None:
        for group in self._taken(running):
            self.registry.free(group, running.waiting.user)
        for group in running.groups.values():
            waiting = running.waiting
            self.registry.unpin(group, waiting.estimated_cost, waiting.handle_bytes)

    def _unended(self) -> set[SessionId]:
        return {session_id for session_id in self.live if not self.ended[session_id]}

    def _begun(self) -> list[SessionId]:
        return [at for at in self._unended() if self.live[at] is not None]

    def _running(self) -> list[SessionId]:
        return [at for at in self._begun() if (one := self.live[at]) and one.has_place]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_session_over_two_models_is_not_starved_of_memory_by_those_over_one(
    data: st.DataObject,
) -> None:
    scheduling = Scheduling()
    for model in "aabb" * 2:
        scheduling.submit("ann", model, 1.0, Tier.DEFAULT, 1.0, 6)
    scheduling.submit("bob", data.draw(st.sampled_from(["ab", "ba"])), 1.0, Tier.DEFAULT, 1.0, 6)
    wide = SessionId(str(len(scheduling.live) - 1))
    for _ in range(3):
        # Who runs ends, in any order: where one never did, there would be no memory to wait for.
        for ended in data.draw(st.permutations(scheduling._running())):
            if scheduling.live[wide] is not None:
                return
            one = scheduling.live[ended]
            assert one is not None
            scheduling.submit(data.draw(USERS), one.here, 1.0, Tier.DEFAULT, 1.0, 6)
            scheduling.end_one(ended)
    raise AssertionError("it has not started")


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_one_that_runs_alone_is_not_starved_by_those_who_keep_coming(data: st.DataObject) -> None:
    scheduling = Scheduling()
    for user in ("ann", "bob", "cy") * 3:
        scheduling.submit(user, "a", 1.0, Tier.DEFAULT, 1.0, 0)
    alone = SessionId(str(len(scheduling.live)))
    scheduling.live[alone] = None
    scheduling.queue.push(WaitingSession(alone, "dora", "a", 1.0, 0.0, is_alone=True))
    for _ in range(4):
        for ended in data.draw(st.permutations(scheduling._running())):
            scheduling.submit(data.draw(USERS), "a", 1.0, Tier.DEFAULT, 1.0, 0)
            scheduling.end_one(ended)
            if scheduling.live[alone] is not None:
                return
    raise AssertionError("it has not started")


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_tiers_share_by_their_weights_however_many_users_they_have() -> None:
    line = FairLine(max_wait_seconds=1e9)
    for number in range(4000):
        for tier, num_users in {Tier.INTERACTIVE: 1, Tier.DEFAULT: 2, Tier.BATCH: 20}.items():
            user = f"{tier} {number % num_users}"
            line.push(WaitingSession(SessionId(f"{tier} {number}"), user, "a", 1.0, 0.0, tier=tier))
    had = _serve(line, 2600)
    total = sum(TIER_WEIGHTS.values())
    for tier, weight in TIER_WEIGHTS.items():
        part = sum(cost for (at, _), cost in had.items() if at is tier) / 2600
        assert abs(part - weight / total) < 0.005


def test_users_of_a_tier_share_by_their_weights() -> None:
    line = FairLine(max_wait_seconds=1e9)
    for number in range(4000):
        for user, weight in {"ann": 3.0, "bob": 1.0}.items():
            session = WaitingSession(SessionId(f"{user} {number}"), user, "a", 2.0, 0.0)
            line.push(replace(session, weight=weight))
    had = _serve(line, 4000)
    assert abs(had[Tier.DEFAULT, "ann"] / had[Tier.DEFAULT, "bob"] - 3) < 0.02


def test_a_tier_of_low_weight_is_never_starved() -> None:
    line = FairLine(max_wait_seconds=1e9)
    batch = WaitingSession(SessionId("batch"), "ann", "a", 1.0, 0.0, tier=Tier.BATCH)
    line.push(batch)
    for number in range(100):
        user = f"user {number}"
        line.push(WaitingSession(SessionId(user), user, "a", 1.0, 0.0, tier=Tier.INTERACTIVE))
    assert (Tier.BATCH, "ann") in _serve(line, 12)


def _serve(line: FairLine, seconds: float) -> Counter[tuple[Tier, str]]:
    had: Counter[tuple[Tier, str]] = Counter()
    while had.total() < seconds:
        session = next(line.in_turn(0.0))
        had[session.tier, session.user] += session.estimated_cost
        line.serve(session, session.estimated_cost, now=0.0)
        line.settle(session, 0.0)
    return had

"""Which groups a session gets: of each of its models the one that is soonest done."""

from __future__ import annotations

import pytest

from insitu_scheduler.placement import Placement
from insitu_scheduler.queue import SessionId, WaitingSession
from insitu_scheduler.registry import Group, LeaseId, Registry


@pytest.fixture
def registry() -> Registry:
    return Registry(ttl_seconds=10)


@pytest.fixture
def placement(registry: Registry) -> Placement:
    return Placement(registry)


def grant(registry: Registry, name: str, *, max_sessions: int = 4) -> Group:
    """A group of the model that its name begins with."""
    return registry.grant(
        LeaseId(name), group_id=name, model=name[0], address="x", num_ranks=1,
        max_sessions=max_sessions, now=0,
    )  # fmt: skip


def waiting(name: str = "s", model: str = "a", **fields: object) -> WaitingSession:
    return WaitingSession(SessionId(name), "ann", model, 1.0, 0.0, **fields)  # type: ignore[arg-type]


def leases(groups: dict[str, Group] | None) -> dict[str, str] | None:
    return groups and {model: group.lease_id for model, group in groups.items()}


def test_the_replica_that_is_soonest_done_comes_first(
    registry: Registry, placement: Placement
) -> None:
    busy, calm = grant(registry, "a1"), grant(registry, "a2")
    registry.pin(busy, 10.0)
    registry.pin(calm, 1.0)
    registry.pin(calm, 1.0)
    assert leases(placement.groups_for(waiting(), "a", set())) == {"a": "a2"}


def test_a_session_goes_where_its_tensors_are_unless_that_takes_longer(
    registry: Registry, placement: Placement
) -> None:
    has, lacks = grant(registry, "a1"), grant(registry, "a2")
    has.brought(["x"])
    registry.pin(has, 2.0)
    bringing = waiting(uploads={"x": 1_000_000_000})
    assert leases(placement.groups_for(bringing, "a", set())) == {"a": "a1"}
    registry.pin(has, 100.0)
    assert leases(placement.groups_for(bringing, "a", set())) == {"a": lacks.lease_id}


def test_a_session_over_several_models_goes_where_each_of_its_values_is_kept(
    registry: Registry, placement: Placement
) -> None:
    for name in ("a1", "a2", "b1", "b2"):
        grant(registry, name)
    wide = waiting(others=frozenset("b"), pins={"b": "b2"})
    registry.pin(registry.of("b")[1], 50.0)
    assert leases(placement.groups_for(wide, "a", set())) == {"a": "a1", "b": "b2"}


def test_a_place_is_needed_on_the_first_model_only(
    registry: Registry, placement: Placement
) -> None:
    first, second = grant(registry, "a1", max_sessions=1), grant(registry, "b1", max_sessions=1)
    wide = waiting(others=frozenset("b"))
    registry.take(second, "bob")
    assert leases(placement.groups_for(wide, "a", set())) == {"a": "a1", "b": "b1"}
    registry.take(first, "bob")
    assert placement.groups_for(wide, "a", set()) is None


def test_a_session_starts_after_those_it_follows_and_on_open_groups_alone(
    registry: Registry, placement: Placement
) -> None:
    group = grant(registry, "a1")
    later = waiting(after=frozenset({SessionId("keeper")}))
    assert placement.groups_for(later, "a", {SessionId("keeper")}) is None
    assert placement.groups_for(later, "a", set()) is not None
    registry.keep_alive(group.lease_id, now=0, is_draining=True)
    assert placement.groups_for(waiting(), "a", set()) is None
    begun = waiting(pins={"a": "a1"}, has_begun=True)
    assert leases(placement.groups_for(begun, "a", set())) == {"a": "a1"}


def test_a_group_is_kept_clear_for_a_session_that_runs_alone(
    registry: Registry, placement: Placement
) -> None:
    one, two = grant(registry, "a1"), grant(registry, "a2")
    for group in (one, two, two):
        registry.pin(group, 1.0)
    alone = waiting("alone", is_alone=True)
    live = {alone.session_id}
    assert placement.groups_for(alone, "a", live) is None
    # The other one takes what comes.
    assert leases(placement.groups_for(waiting("1"), "a", live)) == {"a": "a2"}
    registry.unpin(one, 1.0)
    assert leases(placement.groups_for(waiting("2"), "a", live)) == {"a": "a2"}
    assert leases(placement.groups_for(alone, "a", live)) == {"a": "a1"}


def test_one_that_runs_alone_takes_an_empty_group_that_comes_before_the_one_it_waits_for(
    registry: Registry, placement: Placement
) -> None:
    registry.pin(grant(registry, "a1"), 1.0)
    alone = waiting("alone", is_alone=True)
    assert placement.groups_for(alone, "a", {alone.session_id}) is None
    grant(registry, "a2")
    assert leases(placement.groups_for(alone, "a", {alone.session_id})) == {"a": "a2"}


def test_what_was_kept_clear_for_one_that_is_gone_is_free_again(
    registry: Registry, placement: Placement
) -> None:
    group = grant(registry, "a1")
    registry.pin(group, 1.0)
    alone = waiting("alone", is_alone=True)
    assert placement.groups_for(alone, "a", {alone.session_id}) is None
    assert placement.groups_for(waiting("1"), "a", {alone.session_id}) is None
    assert placement.groups_for(waiting("1"), "a", set()) is not None

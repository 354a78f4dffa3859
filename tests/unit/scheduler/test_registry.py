"""Leases of shard groups, on a clock of the test's own."""

from __future__ import annotations

import pytest

from insitu_scheduler.registry import Group, GroupState, LeaseId, Registry


@pytest.fixture
def registry() -> Registry:
    return Registry(ttl_seconds=10)


def grant(
    registry: Registry, name: str, model: str = "a", *, max_sessions: int = 1, now: float = 0
) -> Group:
    return registry.grant(
        LeaseId(name),
        group_id=f"group-{name}",
        model=model,
        address="x:1",
        num_ranks=2,
        max_sessions=max_sessions,
        now=now,
    )


def test_a_lease_lasts_for_its_ttl_after_each_keep_alive(registry: Registry) -> None:
    group = grant(registry, "1", now=100)
    assert registry.expire(109.9) == []
    assert registry.keep_alive(group.lease_id, now=109)
    assert registry.expire(118.9) == []
    assert registry.expire(119) == [group]
    assert group.lease_id not in registry


def test_an_expired_or_revoked_lease_can_not_be_kept_alive(registry: Registry) -> None:
    group = grant(registry, "1")
    registry.expire(11)
    assert not registry.keep_alive(group.lease_id, now=11)
    other = grant(registry, "2")
    assert registry.revoke(other.lease_id) is other
    assert registry.revoke(other.lease_id) is None
    assert not registry.keep_alive(other.lease_id, now=1)


def test_a_full_group_is_not_ready_until_a_place_is_free(registry: Registry) -> None:
    group = grant(registry, "1", max_sessions=2)
    registry.take(group, "ann")
    assert (group.state, registry.ready_models()) == (GroupState.READY, ["a"])
    registry.take(group, "ann")
    assert (group.state, registry.ready_models()) == (GroupState.BUSY, [])
    registry.free(group, "ann")
    assert (group.state, registry.ready_models()) == (GroupState.READY, ["a"])


def test_the_group_that_was_free_longest_comes_first(registry: Registry) -> None:
    first, second = grant(registry, "1"), grant(registry, "2")
    registry.take(first, "ann")
    registry.free(first, "ann")
    assert registry.of("a") == [second, first]


def test_the_model_with_the_fewest_sessions_comes_first(registry: Registry) -> None:
    for model in "abc":
        grant(registry, model, model, max_sessions=3)
    for model, count in {"a": 2, "b": 1, "c": 3}.items():
        for _ in range(count):
            registry.take(registry.of(model)[0], "ann")
    assert registry.ready_models() == ["b", "a"]


def test_what_a_group_is_expected_to_take_counts_what_has_to_be_brought(registry: Registry) -> None:
    group = grant(registry, "1", max_sessions=4)
    registry.pin(group, 8.0)
    assert group.predicted_seconds({}) == 2.0
    assert group.predicted_seconds({"x": 500_000_000}) == 3.0
    group.brought(["x"])
    assert group.predicted_seconds({"x": 500_000_000}) == 2.0
    registry.unpin(group, 8.0)
    assert group.is_empty
    assert group.expected_seconds == 0.0


def test_a_draining_group_takes_nothing_new_and_never_returns(registry: Registry) -> None:
    group = grant(registry, "1")
    registry.keep_alive(group.lease_id, now=1, is_draining=True)
    registry.keep_alive(group.lease_id, now=2)
    assert (group.state, registry.ready_models()) == (GroupState.DRAINING, [])


def test_freeing_a_group_whose_lease_is_gone_does_not_bring_it_back(registry: Registry) -> None:
    group = grant(registry, "1")
    registry.take(group, "ann")
    registry.revoke(group.lease_id)
    registry.free(group, "ann")
    assert (group.num_sessions, registry.ready_models()) == (0, [])


def test_replicas_are_counted_by_model_and_found_by_group(registry: Registry) -> None:
    grant(registry, "1")
    grant(registry, "2")
    third = grant(registry, "3", "b")
    assert registry.replicas() == {"a": 2, "b": 1}
    assert registry.holder("group-3") is third
    assert registry.holder("group-4") is None


def test_a_user_never_takes_all_places_of_a_group_that_has_several() -> None:
    registry = Registry(ttl_seconds=10)
    group = registry.grant(
        LeaseId("1"), group_id="g", model="a", address="x:1", num_ranks=1, max_sessions=8, now=0
    )
    for _ in range(6):
        assert "ann" not in group.sated_users
        registry.take(group, "ann")
    assert group.sated_users == {"ann"}
    registry.take(group, "bob")
    # The last place is for who has none.
    assert group.sated_users == {"ann", "bob"}
    for _ in range(3):
        registry.free(group, "ann")
    assert group.sated_users == frozenset()


@pytest.mark.parametrize("num_places", [1, 2, 3])
def test_a_small_group_is_for_whoever_comes(num_places: int) -> None:
    registry = Registry(ttl_seconds=10)
    group = registry.grant(
        LeaseId("1"), group_id="g", model="a", address="x", num_ranks=1, max_sessions=num_places,
        now=0,
    )  # fmt: skip
    for _ in range(num_places):
        assert not group.sated_users
        registry.take(group, "ann")

"""Which models hosts have loaded, where there is less memory than models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_scheduler.model_life import Demand, Host, Use, can_hold, plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TURN = 60.0
MODELS = ("a", "b", "c", "d")


def _host(*loaded: str, max_loaded: int = 1, since: float = 0.0, name: str = "h") -> Host:
    return Host(name, MODELS[:3], max_loaded, dict.fromkeys(loaded, since))


def _plan(
    *hosts: Host,
    demands: Sequence[Demand] = (),
    uses: Mapping[tuple[str, str], Use] | None = None,
    elsewhere: frozenset[str] = frozenset(),
    now: float = 1.0,
) -> list[Host]:
    return plan(hosts, demands, uses or {}, elsewhere=elsewhere, now=now, turn_seconds=TURN)


def _wants(*models: str, since: float = 0.0) -> Demand:
    return Demand(frozenset(models), since)


def test_memory_that_nobody_asks_for_holds_the_first_models() -> None:
    (host,) = _plan(_host(max_loaded=2))
    assert list(host.loaded) == ["a", "b"]
    assert _plan(host) == [host]


def test_what_others_serve_is_not_loaded() -> None:
    (host,) = _plan(_host(), demands=[_wants("a")], elsewhere=frozenset("a"))
    assert list(host.loaded) == ["b"]


def test_what_nobody_has_used_for_longest_gives_way_to_what_is_asked_for() -> None:
    uses = {("h", "a"): Use(last_used_at=9.0), ("h", "b"): Use(last_used_at=5.0)}
    (host,) = _plan(_host("a", "b", max_loaded=2), demands=[_wants("c")], uses=uses)
    assert set(host.loaded) == {"a", "c"}


def test_where_users_keep_values_is_unloaded_last() -> None:
    uses = {("h", "a"): Use(last_used_at=9.0), ("h", "b"): Use(keeps_values=True)}
    (host,) = _plan(_host("a", "b", max_loaded=2), demands=[_wants("c")], uses=uses)
    assert set(host.loaded) == {"b", "c"}


def test_what_is_in_use_keeps_its_memory_for_a_turn_and_finishes_what_it_runs() -> None:
    uses = {("h", "a"): Use(num_running=1)}
    (host,) = _plan(_host("a"), demands=[_wants("b")], uses=uses, now=TURN - 1)
    assert host.open == {"a"}
    (host,) = _plan(host, demands=[_wants("b")], uses=uses, now=TURN)
    assert (set(host.loaded), set(host.closing)) == ({"a"}, {"a"})
    assert _plan(host, demands=[_wants("b")], uses=uses, now=TURN + 1) == [host]
    (host,) = _plan(host, demands=[_wants("b")], now=TURN + 2)
    assert (list(host.loaded), set(host.closing)) == (["b"], set())


def test_one_session_makes_room_once_only() -> None:
    uses = {("h", "a"): Use(num_running=1), ("h", "b"): Use(num_running=1)}
    (host,) = _plan(_host("a", "b", max_loaded=2), demands=[_wants("c")], uses=uses, now=TURN)
    assert _plan(host, demands=[_wants("c")], uses=uses, now=9 * TURN) == [host]
    assert len(host.closing) == 1


def test_what_an_older_session_waits_for_does_not_give_way() -> None:
    demands = [_wants("a", since=1.0), _wants("b", since=2.0)]
    (host,) = _plan(_host("a"), demands=demands, now=9 * TURN)
    assert host.open == {"a"}


def test_a_session_over_two_models_has_both_at_once() -> None:
    (host,) = _plan(_host("c", "a", max_loaded=2), demands=[_wants("a", "b")])
    assert set(host.loaded) == {"a", "b"}


def test_hosts_hold_models_at_once_only_if_each_finds_a_place() -> None:
    small, other = _host(name="x"), replace(_host(name="y"), models=("a",))
    assert can_hold({"a", "b"}, [small, other])
    assert not can_hold({"b", "c"}, [small, other])
    assert not can_hold({"a", "b"}, [small])


_loads = st.lists(
    st.tuples(st.sampled_from(MODELS), st.integers(1, 90), st.integers(0, 40)), max_size=25
)


@given(_loads, st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_all_sessions_run_and_memory_always_suffices(
    sessions: list[tuple[str, int, int]], max_loaded: int, num_hosts: int
) -> None:
    """Plays sessions (model, duration, pause before it) in ticks of ten seconds."""
    hosts = [Host(f"h{n}", MODELS, max_loaded, {}) for n in range(num_hosts)]
    arriving = [(sum(pause for *_, pause in sessions[: n + 1]), *sessions[n][:2]) for n in
                range(len(sessions))]  # fmt: skip
    waiting: list[tuple[float, str, int]] = []
    running: list[tuple[tuple[str, str], float]] = []
    for now in range(0, 40_000, 10):
        waiting += [at for at in arriving if at[0] <= now]
        arriving = [at for at in arriving if at[0] > now]
        running = [(key, end) for key, end in running if end > now]
        uses = {key: Use(sum(other == key for other, _ in running), now) for key, _ in running}
        demands = [Demand(frozenset({model}), since) for since, model, _ in waiting]
        before = hosts
        hosts = plan(hosts, demands, uses, elsewhere=set(), now=now, turn_seconds=TURN)
        for old, new in zip(before, hosts, strict=True):
            assert len(new.loaded) <= max_loaded
            assert new.closing <= new.loaded.keys()
            gone = old.loaded.keys() - new.loaded.keys()
            assert not any((old.host_id, model) in uses for model in gone)
        for at in list(waiting):
            place = next((host.host_id for host in hosts if at[1] in host.open), None)
            if place is not None:
                waiting.remove(at)
                running.append(((place, at[1]), now + at[2]))
        if not waiting and not arriving and not running:
            return
    raise AssertionError(f"these never ran: {waiting}")

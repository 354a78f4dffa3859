"""Whose pass is next at a group."""

from __future__ import annotations

from collections import Counter

from insitu_shard.engine.turns import Turns


def _run(turns: Turns, keys: list[str], costs: dict[str, float], times: int) -> Counter[str]:
    had: Counter[str] = Counter()
    for _ in range(times):
        first = turns.order(keys)[0]
        turns.took(first)
        turns.charge(first, costs[first[0]])
        had[first] += 1
    return had


def test_a_user_with_many_segments_gets_no_more_than_one_with_one() -> None:
    turns = Turns()
    keys = [f"a{number}" for number in range(8)] + ["b"]
    for key in keys:
        turns.add(key, user=key[0])
    had = _run(turns, keys, {"a": 1.0, "b": 1.0}, 32)
    assert had["b"] == 16
    assert {had[key] for key in keys[:-1]} == {2}


def test_passes_count_by_their_cost() -> None:
    turns = Turns()
    for key in ("a", "b"):
        turns.add(key, user=key)
    had = _run(turns, ["a", "b"], {"a": 9.0, "b": 1.0}, 100)
    assert had == {"a": 10, "b": 90}


def test_one_who_comes_is_not_ahead_of_those_who_are_there() -> None:
    turns = Turns()
    turns.add("a", user="a")
    _run(turns, ["a"], {"a": 1.0}, 50)
    turns.add("b", user="b")
    had = _run(turns, ["a", "b"], {"a": 1.0, "b": 1.0}, 10)
    assert had["b"] == 5


def test_one_who_goes_and_comes_again_starts_with_the_others() -> None:
    turns = Turns()
    for key in ("a", "b"):
        turns.add(key, user=key)
    turns.charge("a", 100.0)
    turns.remove("a")
    turns.add("a", user="a")
    assert turns.order(["a", "b"])[0] in {"a", "b"}
    turns.charge("a", 1.0)
    assert turns.order(["a", "b"]) == ["b", "a"]

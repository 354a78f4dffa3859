"""The order in which waiting sessions run: fair between users, and no session is lost."""

from __future__ import annotations

import pytest

from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.queue import SessionId, WaitingSession


def waiting(
    name: str,
    model: str | None = "a",
    *,
    user: str = "ann",
    cost: float = 1.0,
    enqueued_at: float = 0.0,
    others: str = "",
) -> WaitingSession:
    return WaitingSession(SessionId(name), user, model, cost, enqueued_at, others=frozenset(others))


@pytest.fixture
def queue() -> FairQueue:
    return FairQueue()


def test_sessions_of_a_model_leave_in_the_order_in_which_they_came(queue: FairQueue) -> None:
    for name in ("1", "2", "3"):
        queue.push(waiting(name))
    left = [queue.pop("a", {"a", "b"}) for _ in range(4)]
    assert [session.session_id if session else None for session in left] == ["1", "2", "3", None]


def test_a_model_is_never_given_the_session_of_another(queue: FairQueue) -> None:
    queue.push(waiting("1", "b"))
    assert queue.pop("a", {"a", "b"}) is None
    assert queue.pop("b", {"a", "b"}) == waiting("1", "b")


def test_sessions_for_any_model_and_for_one_take_turns(queue: FairQueue) -> None:
    for name, model in (("1", "a"), ("2", None), ("3", None), ("4", "a")):
        queue.push(waiting(name, model))
    left = [queue.pop("a", {"a"}) for _ in range(4)]
    assert [session.session_id for session in left if session] == ["1", "2", "4", "3"]


def test_a_removed_session_is_gone_and_others_move_up(queue: FairQueue) -> None:
    for name in ("1", "2", "3"):
        queue.push(waiting(name))
    assert queue.remove(SessionId("2")) == waiting("2")
    assert queue.remove(SessionId("2")) is None
    assert dict(queue.positions()) == {"1": 1, "3": 2}
    assert len(queue) == queue.num_waiting("a") == 2


def test_a_newcomer_is_told_how_many_are_ahead_of_it(queue: FairQueue) -> None:
    for number in range(100):
        queue.push(waiting(f"ann {number}"))
    queue.push(waiting("bob 1", user="bob"))
    assert queue.num_ahead("a", "ann") == 101
    assert queue.num_ahead("a", "bob") == 3
    assert queue.num_ahead("a", "cy") == 2
    assert queue.num_ahead("b", "ann") == 0


def test_the_oldest_of_a_line_is_its_head(queue: FairQueue) -> None:
    queue.push(waiting("1"))
    queue.push(waiting("2"))
    assert queue.oldest("a") == waiting("1")
    queue.pop("a", {"a", "b"})
    queue.pop("a", {"a", "b"})
    assert queue.oldest("a") is None


def test_a_session_over_several_models_waits_for_all_and_is_not_overtaken() -> None:
    queue = FairQueue()
    first = waiting("1", "b")
    wide = WaitingSession(
        SessionId("2"), "ann", "a", estimated_cost=1.0, enqueued_at=0.0, others=frozenset({"b"})
    )
    for session in (first, wide, waiting("3", "a"), waiting("4", "b")):
        queue.push(session)
    assert queue.pop("a", {"a"}) is None
    assert queue.pop("b", {"b"}) is first
    assert queue.pop("b", {"b"}) is None
    assert queue.pop("b", {"a", "b"}) is wide
    assert queue.pop("a", {"a", "b"}) == waiting("3", "a")
    assert queue.pop("b", {"a", "b"}) == waiting("4", "b")


@pytest.mark.parametrize("other", ["", "b"])
def test_a_session_that_runs_after_another_is_overtaken_until_that_has_ended(other: str) -> None:
    queue = FairQueue()
    keeper, free = SessionId("0"), {"a", "b"}
    later = WaitingSession(
        SessionId("1"), "ann", "a", estimated_cost=1.0, enqueued_at=0.0,
        others=frozenset(filter(None, [other])), after=frozenset({keeper}),
    )  # fmt: skip
    queue.push(later)
    queue.push(waiting("2", "a"))
    assert queue.pop("b", free, live={keeper}) is None
    assert queue.pop("a", free, live={keeper}) == waiting("2", "a")
    assert queue.pop("a", free, live={keeper}) is None
    assert queue.pop("a", free) is later


def test_sessions_over_the_same_models_do_not_keep_each_others_groups() -> None:
    queue = FairQueue()
    for name, (model, other) in {"1": "ab", "2": "ba"}.items():
        queue.push(
            WaitingSession(
                SessionId(name), "ann", model, estimated_cost=1.0, enqueued_at=0.0,
                others=frozenset({other}),
            )
        )  # fmt: skip
    order = [queue.pop("b", {"a", "b"}), queue.pop("a", {"a", "b"})]
    assert [session.session_id for session in order if session] == ["1", "2"]

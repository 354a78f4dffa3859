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


def pop(queue: FairQueue, model: str) -> WaitingSession | None:
    """Takes out the session that is due next, wherever it runs."""
    found = queue.pop(model, lambda session: True)
    return found[0] if found else None


@pytest.fixture
def queue() -> FairQueue:
    return FairQueue()


def test_sessions_of_a_model_leave_in_the_order_in_which_they_came(queue: FairQueue) -> None:
    for name in ("1", "2", "3"):
        queue.push(waiting(name))
    left = [pop(queue, "a") for _ in range(4)]
    assert [session.session_id if session else None for session in left] == ["1", "2", "3", None]


def test_a_model_is_never_given_the_session_of_another(queue: FairQueue) -> None:
    queue.push(waiting("1", "b"))
    assert pop(queue, "a") is None
    assert pop(queue, "b") == waiting("1", "b")


def test_sessions_for_any_model_and_for_one_take_turns(queue: FairQueue) -> None:
    for name, model in (("1", "a"), ("2", None), ("3", None), ("4", "a")):
        queue.push(waiting(name, model))
    left = [pop(queue, "a") for _ in range(4)]
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
    pop(queue, "a")
    pop(queue, "a")
    assert queue.oldest("a") is None


def test_a_session_that_can_not_start_is_overtaken(queue: FairQueue) -> None:
    for name in ("1", "2"):
        queue.push(waiting(name))
    found = queue.pop("a", lambda session: session.session_id == "2" or None)
    assert found is not None
    assert found[0] == waiting("2")
    assert SessionId("1") in queue


def test_a_session_over_several_models_waits_in_the_line_of_its_first(queue: FairQueue) -> None:
    queue.push(waiting("1", "a", others="b"))
    assert [queue.num_waiting(model) for model in "ab"] == [1, 0]
    assert pop(queue, "b") is None
    assert pop(queue, "a") == waiting("1", "a", others="b")


def test_a_session_over_several_models_is_paid_for_in_the_lines_of_all(queue: FairQueue) -> None:
    queue.push(waiting("1", "a", cost=10.0, others="b"))
    assert pop(queue, "a") is not None
    for user in ("ann", "bob"):
        queue.push(waiting(f"{user} on b", "b", user=user))
    assert pop(queue, "b") == waiting("bob on b", "b", user="bob")


def test_one_that_goes_on_comes_before_its_users_own(queue: FairQueue) -> None:
    queue.push(waiting("1"))
    queue.push(waiting("2"), is_first=True)
    assert pop(queue, "a") == waiting("2")

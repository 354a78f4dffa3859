"""Kept values are their user's, and sessions that load them go where they are."""

from __future__ import annotations

import pytest

from insitu_proto.v1.intervention_pb2 import Keep, Load, Node
from insitu_proto.v1.session_pb2 import Session
from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.kept_values import KeptValues
from insitu_scheduler.queue import SessionId, WaitingSession
from insitu_scheduler.registry import LeaseId
from insitu_wire.errors import NotFoundError, VersionError
from support.fake_shard import read, reference, trace

ONE, TWO = LeaseId("one"), LeaseId("two")


def _keeping(handle: str) -> Session:
    kept = Node(id=2, keep=Keep(value=reference(1), handle_id=handle))
    return Session(steps=[trace(read(1), kept, model="a")])


def _loading(*handles: str, model: str = "a") -> Session:
    nodes = [Node(id=at, load=Load(handle_id=name)) for at, name in enumerate(handles, 1)]
    return Session(steps=[trace(*nodes, model=model)])


def test_a_session_goes_to_the_group_that_keeps_what_it_loads() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    assert kept.group_of("ann", _loading("x")) == ONE
    assert kept.group_of("ann", _loading()) is None


def test_a_session_runs_after_those_that_keep_what_it_loads() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    kept.add("ann", _keeping("y"), {"a": ONE}, keeper=SessionId("t"))
    assert kept.keepers("ann", _loading("x", "y", "z")) == {"s", "t"}
    assert kept.keepers("bob", _loading("x")) == frozenset()


def test_nobody_finds_what_is_anothers_or_gone() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    with pytest.raises(NotFoundError):
        kept.group_of("bob", _loading("x"))
    kept.lose(ONE)
    with pytest.raises(NotFoundError):
        kept.group_of("ann", _loading("x"))


def test_values_of_two_groups_or_of_another_models_are_refused() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    kept.add("ann", _keeping("y"), {"a": TWO}, keeper=SessionId("t"))
    with pytest.raises(VersionError, match="several shard groups"):
        kept.group_of("ann", _loading("x", "y"))
    with pytest.raises(VersionError, match="is loaded in a trace of b"):
        kept.group_of("ann", _loading("x", model="b"))


def test_a_session_that_needs_one_group_waits_for_it_and_holds_up_nobody() -> None:
    queue = FairQueue()
    for name, lease in (("1", TWO), ("2", None)):
        queue.push(
            WaitingSession(
                SessionId(name), "ann", "a", estimated_cost=1.0, enqueued_at=0.0, lease_id=lease
            )
        )
    first, second = queue.pop("a", {"a"}, ONE), queue.pop("a", {"a"}, TWO)
    assert first is not None
    assert first.session_id == "2"
    assert second is not None
    assert second.session_id == "1"

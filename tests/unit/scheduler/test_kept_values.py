"""Kept values are their user's, and sessions that load them go where they are."""

from __future__ import annotations

import pytest

from insitu_proto.v1.intervention_pb2 import Keep, Load, Node
from insitu_proto.v1.session_pb2 import Compute, Session, Step
from insitu_scheduler.kept_values import KeptValues
from insitu_scheduler.queue import SessionId
from insitu_scheduler.registry import LeaseId
from insitu_wire.errors import NotFoundError, PermissionDeniedError, VersionError
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
    assert kept.groups_of("ann", _loading("x")) == {"a": ONE}
    assert kept.groups_of("ann", _loading()) == {}


def test_a_session_runs_after_those_that_keep_what_it_loads() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    kept.add("ann", _keeping("y"), {"a": ONE}, keeper=SessionId("t"))
    assert kept.keepers("ann", _loading("x", "y", "z")) == {"s", "t"}
    assert kept.keepers("bob", _loading("x")) == frozenset()


def test_nobody_finds_what_is_anothers_or_gone() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    with pytest.raises(PermissionDeniedError):
        kept.groups_of("bob", _loading("x"))
    with pytest.raises(PermissionDeniedError):
        kept.find("bob", "x")
    kept.lose(ONE)
    for user in ("ann", "bob"):
        with pytest.raises(NotFoundError):
            kept.groups_of(user, _loading("x"))
    assert not kept.has_any(ONE)


def test_one_name_may_be_of_several_users_each_with_a_value_of_their_own() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    kept.add("bob", _keeping("x"), {"a": TWO}, keeper=SessionId("t"))
    assert kept.groups_of("ann", _loading("x")) == {"a": ONE}
    assert kept.groups_of("bob", _loading("x")) == {"a": TWO}
    kept.forget("ann", "x")
    with pytest.raises(PermissionDeniedError):
        kept.find("ann", "x")
    assert kept.find("bob", "x") is not None


def test_values_of_two_groups_or_of_another_models_are_refused() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    kept.add("ann", _keeping("y"), {"a": TWO}, keeper=SessionId("t"))
    with pytest.raises(VersionError, match="several shard groups of a"):
        kept.groups_of("ann", _loading("x", "y"))
    with pytest.raises(VersionError, match="is loaded in a trace of b"):
        kept.groups_of("ann", _loading("x", model="b"))


def test_a_value_that_is_kept_between_traces_is_with_the_model_of_the_trace_before() -> None:
    between = Node(id=3, keep=Keep(value=reference(1), handle_id="x"))
    session = Session(
        steps=[trace(read(1), model="a"), Step(compute=Compute(nodes=[between])), *_steps("b")]
    )
    for leases in ({"a": ONE, "b": TWO}, {"b": TWO, "a": ONE}):
        kept = KeptValues()
        kept.add("ann", session, leases, keeper=SessionId("s"))
        assert kept.groups_of("ann", _loading("x")) == {"a": ONE}


def test_a_session_may_load_what_groups_of_several_models_keep() -> None:
    kept = KeptValues()
    kept.add("ann", _keeping("x"), {"a": ONE}, keeper=SessionId("s"))
    other = Node(id=2, keep=Keep(value=reference(1), handle_id="y"))
    other_session = Session(steps=[trace(read(1), other, model="b")])
    kept.add("ann", other_session, {"b": TWO}, keeper=SessionId("t"))
    both = Session(steps=[*_loading("x").steps, *_loading("y", model="b").steps])
    assert kept.groups_of("ann", both) == {"a": ONE, "b": TWO}


def _steps(model: str) -> list[Step]:
    return [trace(read(1), model=model)]

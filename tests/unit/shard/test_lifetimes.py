"""How long values stay that users keep beyond sessions."""

from __future__ import annotations

from insitu_proto.v1.intervention_pb2 import Load, Node
from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, Segment
from insitu_shard.lifetimes import Lifetimes
from support.fake_shard import trace


def _loading(handle_id: str) -> RunSegmentRequest:
    node = Node(id=1, load=Load(handle_id=handle_id))
    return RunSegmentRequest(user="ann", segment=Segment(steps=[trace(node)]))


def test_a_value_expires_some_time_after_the_last_segment_that_used_it_began() -> None:
    lifetimes = Lifetimes(10)
    lifetimes.begin("1", _loading("x"), now=0)
    lifetimes.end("1")
    lifetimes.begin("2", _loading("x"), now=5)
    lifetimes.end("2")
    assert lifetimes.expired(now=15) == []
    assert lifetimes.expired(now=15.1) == [("ann", "x")]


def test_a_value_does_not_expire_while_a_segment_uses_it() -> None:
    lifetimes = Lifetimes(10)
    lifetimes.begin("1", _loading("x"), now=0)
    assert lifetimes.expired(now=100) == []
    lifetimes.end("1")
    assert lifetimes.expired(now=100) == [("ann", "x")]


def test_a_value_that_is_to_go_goes_after_all_segments_that_use_it() -> None:
    lifetimes = Lifetimes(10)
    lifetimes.begin("1", _loading("x"), now=0)
    lifetimes.begin("2", _loading("x"), now=0)
    assert not lifetimes.forget("ann", "x")
    lifetimes.begin("3", _loading("x"), now=0)
    lifetimes.end("3")
    lifetimes.end("1")
    assert lifetimes.expired(now=1) == []
    lifetimes.end("2")
    assert lifetimes.expired(now=1) == [("ann", "x")]
    assert lifetimes.forget("ann", "x")
    assert lifetimes.expired(now=100) == []

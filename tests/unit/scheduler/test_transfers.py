"""Values move to the group that uses them, from where they were last written to."""

from __future__ import annotations

import pytest

from insitu_proto.v1.intervention_pb2 import Assign, Call, Node
from insitu_proto.v1.session_pb2 import Session
from insitu_proto.v1.value_pb2 import Value
from insitu_scheduler.segments import cut
from insitu_scheduler.transfers import Transfers, plan_transfers
from insitu_wire.errors import VersionError
from support.fake_shard import read, reference, save, trace


def _plan(session: Session) -> list[Transfers]:
    return plan_transfers(session, cut(session))


def call(node_id: int, name: str, *args: Value) -> Node:
    return Node(id=node_id, call=Call(name=name, args=args))


def test_a_value_moves_to_the_model_that_uses_it_and_stays_as_long_as_it_is_used() -> None:
    session = Session(
        steps=[
            trace(read(1), model="a"),
            trace(call(2, "torch.abs", reference(1)), model="b"),
            trace(save(3, 1), save(4, 2), model="a"),
        ]
    )
    assert _plan(session) == [
        Transfers({}, (1,)),
        Transfers({"a": (1,)}, (1, 2)),
        Transfers({"b": (2,)}, ()),
    ]


def test_a_variable_is_where_it_was_assigned_last() -> None:
    assign = Node(id=2, assign=Assign(node_id=1, value=Value(int_value=1)))
    session = Session(
        steps=[
            trace(call(1, "insitu.variable", Value(int_value=0)), model="a"),
            trace(assign, model="b"),
            trace(save(3, 1), model="a"),
        ]
    )
    assert _plan(session)[2] == Transfers({"b": (1,)}, ())


def test_a_list_is_where_it_was_appended_to_last() -> None:
    session = Session(
        steps=[
            trace(call(1, "insitu.list", Value()), model="a"),
            trace(call(2, "insitu.append", reference(1), Value(int_value=1)), model="b"),
            trace(save(3, 1), model="a"),
        ]
    )
    assert _plan(session)[1].imports == {"a": (1,)}
    assert _plan(session)[2].imports == {"b": (1,)}


def test_a_write_into_a_tensor_of_another_group_is_refused() -> None:
    session = Session(
        steps=[
            trace(read(1), model="a"),
            trace(call(2, "torch.Tensor.zero_", reference(1)), model="b"),
        ]
    )
    with pytest.raises(VersionError, match=r"another model.*clone"):
        _plan(session)

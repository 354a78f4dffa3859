from __future__ import annotations

from insitu_shard.engine.graph import (
    Boundary,
    Call,
    HookPoint,
    Node,
    Operation,
    Read,
    Ref,
    Save,
    Side,
    Write,
)
from insitu_shard.engine.plan import Plan, plan_nodes

HIDDEN = HookPoint("layers.1", Side.OUTPUT)
LATER = HookPoint("layers.2", Side.OUTPUT)


def _plan(*operations: Operation, used_later: tuple[int, ...] = ()) -> Plan:
    nodes = tuple(Node(number, operation) for number, operation in enumerate(operations, 1))
    return plan_nodes(nodes, used_later=used_later)


def _call(word: str, *args: object) -> Call:
    return Call(f"torch.Tensor.{word}", args, {})


def test_a_node_waits_for_what_it_uses_however_deep() -> None:
    plan = _plan(Read(HIDDEN), Read(LATER), _call("__getitem__", Ref(1), (slice(None, Ref(2)),)))
    assert plan.predecessors[3] == {1, 2}
    assert plan.successors[2] == (3,)


def test_reads_and_writes_are_tied_to_their_boundary() -> None:
    plan = _plan(Read(HIDDEN), Write(HIDDEN, 0), Read(LATER))
    boundary = Boundary("layers.1", False, 0)
    assert plan.at_boundary[boundary] == (1, 2)
    assert plan.due_at_boundary[boundary] == (2,)


def test_input_and_inputs_share_a_boundary() -> None:
    plan = _plan(Read(HookPoint("m", Side.INPUT)), Read(HookPoint("m", Side.INPUTS)))
    assert plan.at_boundary == {Boundary("m", True, 0): (1, 2)}


def test_a_write_through_a_view_is_a_write_to_its_base() -> None:
    plan = _plan(Read(HIDDEN), _call("__getitem__", Ref(1), 0), _call("__setitem__", Ref(2), 0, 5))
    assert plan.due_at_boundary[Boundary("layers.1", False, 0)] == (3,)


def test_a_write_to_a_copy_is_not_due_anywhere() -> None:
    plan = _plan(Read(HIDDEN), _call("clone", Ref(1)), _call("zero_", Ref(2)))
    assert plan.due_at_boundary == {}


def test_a_reader_after_a_write_waits_for_it_through_any_view() -> None:
    plan = _plan(
        Read(HIDDEN),
        _call("__getitem__", Ref(1), 0),
        _call("__setitem__", Ref(2), 0, 5),
        _call("sum", Ref(1)),
    )
    assert 3 in plan.predecessors[4]


def test_a_reader_before_a_write_gets_a_copy_and_a_view_makes_the_write_wait() -> None:
    plan = _plan(
        Read(HIDDEN),
        _call("sum", Ref(1)),
        _call("__getitem__", Ref(1), 0),
        _call("zero_", Ref(1)),
    )
    assert plan.readers_before[4] == (2,)
    assert 3 in plan.predecessors[4]
    assert 2 not in plan.predecessors[4]


def test_writes_to_one_memory_keep_their_order() -> None:
    plan = _plan(Read(HIDDEN), _call("zero_", Ref(1)), _call("add_", Ref(1), 1))
    assert 2 in plan.predecessors[3]


def test_values_of_earlier_traces_count_as_one_memory() -> None:
    nodes = (Node(11, _call("zero_", Ref(3))), Node(12, _call("sum", Ref(5))))
    plan = plan_nodes(nodes, used_later=())
    assert plan.predecessors[12] == {11}


def test_uses_and_outliving_values_are_counted() -> None:
    plan = _plan(Read(HIDDEN), _call("sum", Ref(1)), Save(Ref(1), ""), used_later=(2, 99))
    assert plan.num_uses == {1: 2}
    assert plan.outliving == {2}

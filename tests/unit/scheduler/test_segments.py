"""Sessions are cut where the model changes, and nowhere else."""

from __future__ import annotations

from insitu_proto.v1.session_pb2 import Branch, Exit, Loop, Session, Step
from insitu_proto.v1.tensor_pb2 import Tensor
from insitu_proto.v1.value_pb2 import ListValue, Reference, Value
from insitu_scheduler.cost_model import Work
from insitu_scheduler.segments import SegmentRange, count_traces, cut, work_of
from support.fake_shard import log, trace

EXIT = Step(exit=Exit())


def test_a_session_on_one_model_is_one_segment_with_its_logs_and_exit() -> None:
    session = Session(steps=[log("x"), trace(), log("y"), trace(), EXIT])
    assert cut(session) == [SegmentRange("tiny/model", 0, 5, 1)]
    assert count_traces(session) == 2


def test_a_session_without_traces_needs_no_certain_model() -> None:
    assert cut(Session(steps=[log("x"), EXIT])) == [SegmentRange(None, 0, 2, 1)]


def test_a_log_joins_the_segment_before_it_where_the_model_changes() -> None:
    session = Session(steps=[trace(model="a"), log("x"), trace(model="b"), trace(model="a")])
    assert cut(session) == [
        SegmentRange("a", 0, 2, 1),
        SegmentRange("b", 2, 3, 2),
        SegmentRange("a", 3, 4, 3),
    ]


def test_the_expected_cost_grows_with_the_tokens() -> None:
    assert work_of(Session(steps=[trace(), log("x"), trace()])) == Work(num_traces=2, num_tokens=6)


def _loop(items: Value, *steps: Step) -> Step:
    return Step(loop=Loop(items=items, item_node_id=9, steps=steps))


def test_what_a_loop_repeats_counts_as_often_as_is_known() -> None:
    three = Value(list=ListValue(items=[Value(int_value=at) for at in range(3)]))
    five = Value(tensor_index=0)
    unknown = Value(reference=Reference(node_id=1))
    branch = Step(branch=Branch(steps=[trace()], else_steps=[trace()]))
    steps = [trace(), _loop(three, trace(), _loop(five, branch), _loop(unknown, trace()))]
    session = Session(steps=steps, tensors=[Tensor(shape=[5, 2])])
    times = 1 + 3 * (1 + 5 * 2 + 1)
    assert work_of(session) == Work(num_traces=times, num_tokens=3 * times)


def test_loops_in_loops_do_not_make_an_expectation_that_drowns_all_others() -> None:
    many = Value(list=ListValue(items=[Value(int_value=0)] * 1000))
    step = trace()
    for _ in range(5):
        step = _loop(many, step)
    assert work_of(Session(steps=[step])).num_traces <= 100_000

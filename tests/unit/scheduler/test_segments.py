"""Sessions are cut where the model changes, and nowhere else."""

from __future__ import annotations

from insitu_proto.v1.intervention_pb2 import HookPoint, Node, Read, Skip
from insitu_proto.v1.model_pb2 import ModelDescription, Module
from insitu_proto.v1.session_pb2 import Branch, Exit, Loop, Session, Step
from insitu_proto.v1.tensor_pb2 import Tensor
from insitu_proto.v1.training_pb2 import Backward
from insitu_proto.v1.value_pb2 import ListValue, Reference, Value
from insitu_scheduler.cost_model import Work
from insitu_scheduler.models import KnownModel
from insitu_scheduler.segments import SegmentRange, count_tokens, count_traces, cut, work_of
from support.fake_shard import log, trace

EXIT = Step(exit=Exit())


def _unknown(model: str) -> dict[str, float]:
    return {}


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
    session = Session(steps=[trace(), log("x"), trace()])
    assert work_of(session, _unknown) == Work(num_traces=2, num_tokens=6)
    assert count_tokens(session) == 6


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
    assert work_of(session, _unknown) == Work(num_traces=times, num_tokens=3 * times)
    assert count_tokens(session) == 3 * times


def test_loops_in_loops_do_not_make_an_expectation_that_drowns_all_others() -> None:
    many = Value(list=ListValue(items=[Value(int_value=0)] * 1000))
    step = trace()
    for _ in range(5):
        step = _loop(many, step)
    assert work_of(Session(steps=[step]), _unknown).num_traces <= 100_000


def test_a_trace_costs_the_layers_down_to_the_last_that_it_looks_at() -> None:
    paths = ["", "model", "model.embed", "model.layers.0", "model.layers.0.mlp", "model.layers.1"]
    modules = [
        Module(path=path, call_order=order, is_block=path in {"model.layers.0", "model.layers.1"})
        for order, path in enumerate([*paths, "lm_head"], 1)
    ]
    known = KnownModel.from_description(ModelDescription(modules=modules), ())

    def tokens(*nodes: Node, generates: int = 0) -> float:
        step = trace(*nodes)
        if generates:
            step.trace.generation.max_new_tokens = generates
        return work_of(Session(steps=[step]), lambda model: known.depths).num_tokens

    def reading(path: str) -> Node:
        return Node(id=1, read=Read(hook_point=HookPoint(module_path=path)))

    first = reading("model.layers.0.mlp")
    assert tokens(first) == 3 / 2
    assert tokens(reading("model.embed")) == 0
    assert tokens(first, reading("lm_head")) == tokens(reading("model")) == 3
    assert tokens(Node(id=1, skip=Skip(module_path="model.layers.1"))) == 3
    assert tokens(first, Node(id=2, backward=Backward())) == 3 * 3 / 2
    assert tokens(first, generates=2) == 3 + 1

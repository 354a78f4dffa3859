"""Each bad session is refused with its reason, the value, and the user's line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from insitu_proto.v1 import value_pb2
from insitu_proto.v1.intervention_pb2 import (
    Call,
    EndGeneration,
    Gradient,
    HookPoint,
    HookSide,
    ModuleCall,
    Node,
    Read,
    SourceLocation,
    Write,
)
from insitu_proto.v1.session_pb2 import Branch, Exit, Loop, Session, Step
from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_proto.v1.trace_pb2 import Generation, Invoke, TokenRow, Trace, TraceMode
from insitu_proto.v1.value_pb2 import Value
from insitu_scheduler.models import KnownModel
from insitu_scheduler.validation import check_size, validate
from insitu_scheduler.value_checks import MAX_DEPTH
from insitu_wire.errors import Error, InvalidTraceError, Location, Reason
from support.fake_shard import MODEL, describe, log, read, reference, save, saving, trace

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = {name: KnownModel.from_description(describe(name), ()) for name in (MODEL, "tiny/other")}


def refused(session: Session) -> Error:
    with pytest.raises(Error) as caught:
        validate(session, MODELS)
    return caught.value


def _generating(**options: float) -> Trace:
    return Trace(mode=TraceMode.TRACE_MODE_GENERATE, generation=Generation(**options))


def _generate_and_read(session: Session, step: int) -> None:
    session.steps[0].trace.MergeFrom(_generating(max_new_tokens=3))
    session.steps[0].trace.nodes[0].read.hook_point.step = step


def _generate_and_end(session: Session, end: EndGeneration) -> None:
    session.steps[0].trace.MergeFrom(_generating(max_new_tokens=3))
    session.steps[0].trace.nodes.add(id=3, end_generation=end)


def call(name: str, *args: Value, **kwargs: Value) -> Node:
    return Node(id=2, call=Call(name=name, args=args, kwargs=kwargs))


def with_value(value: Value) -> Session:
    return Session(steps=[trace(read(1), call("torch.abs", value))])


def with_tensor(**fields: object) -> Session:
    fields = {"dtype": Dtype.DTYPE_FLOAT32, "shape": [2], "data": b"x" * 8} | fields
    content = {name: field for name, field in fields.items() if field is not None}
    return with_value(Value(tensor=Tensor(**content)))  # type: ignore[arg-type]


def edited(edit: Callable[[Session], object]) -> Session:
    session = saving()
    edit(session)
    return session


def _gradient_of_a_number() -> Gradient:
    return Gradient(loss=Value(int_value=1), value=reference(1))


def _nested(depth: int) -> Step:
    step = Step(exit=Exit())
    for _ in range(depth):
        condition = Value(bool_value=True)
        step = Step(branch=Branch(condition=condition, steps=[step]))
    return step


def nested(depth: int) -> Value:
    value = Value(int_value=1)
    for _ in range(depth - 1):
        value = Value(list=value_pb2.ListValue(items=[value]))
    return value


def with_key(*keys: Value) -> Session:
    items = [value_pb2.DictItem(key=key, value=Value(int_value=1)) for key in keys]
    return with_value(Value(dict=value_pb2.DictValue(items=items)))


def test_a_session_that_uses_all_that_the_server_runs_is_accepted() -> None:
    hook_point = HookPoint(module_path="model.layers.1", side=HookSide.HOOK_SIDE_INPUT)
    parts = value_pb2.SliceValue(start=reference(1), stop=Value(int_value=2))
    index = Value(tuple=value_pb2.ListValue(items=[Value(slice=parts), Value(int_value=0)]))
    tensor = Tensor(dtype=Dtype.DTYPE_BOOL, shape=[0, 3], data=b"")
    nodes = [
        read(1, ""),
        call("operator.getitem", reference(1), index),
        Node(id=3, module_call=ModuleCall(module_path="lm_head", args=[reference(2)])),
        Node(id=4, write=Write(hook_point=hook_point, value=Value(tensor=tensor))),
        save(5, of=3),
    ]
    later = log("x")
    later.log.values.append(reference(2))
    validate(Session(steps=[trace(*nodes), later, trace(save(6, of=1)), Step(exit=Exit())]), MODELS)


@pytest.mark.parametrize(
    ("reason", "words", "session"),
    [
        (Reason.MALFORMED_SESSION, "no steps", Session()),
        (Reason.UNSUPPORTED_FEATURE, "step 1 is of a kind", Session(steps=[Step()])),
        (Reason.UNSUPPORTED_FEATURE, "kind", Session(steps=[Step(loop=Loop(item_node_id=1))])),
        (Reason.UNSUPPORTED_FEATURE, "kind", Session(steps=[Step(branch=Branch())])),
        (
            Reason.MALFORMED_SESSION,
            "a loop that it is not in",
            Session(steps=[Step(exit=Exit(loop_item_node_id=3))]),
        ),
        (
            Reason.MALFORMED_SESSION,
            "nested deeper",
            Session(steps=[_nested(20)]),
        ),
        (Reason.UNSUPPORTED_FEATURE, "node 1 is an", Session(steps=[trace(Node(id=1))])),
        (
            Reason.MALFORMED_SESSION,
            "node 2 is a gradient, and its loss or its value is no reference",
            Session(steps=[trace(read(1), Node(id=2, gradient=_gradient_of_a_number()))]),
        ),
        (
            Reason.UNSUPPORTED_FEATURE,
            "'tiny/model' and 'tiny/other'",
            Session(
                steps=[
                    Step(
                        loop=Loop(
                            items=Value(list=value_pb2.ListValue()),
                            item_node_id=1,
                            steps=[trace(), trace(model="tiny/other")],
                        )
                    )
                ]
            ),
        ),
        (Reason.MODEL_NOT_FOUND, "tiny/model, tiny/other", Session(steps=[trace(model="gpt-9")])),
        (Reason.UNKNOWN_MODULE_PATH, "model.layers.0", Session(steps=[trace(read(1, "layers.0"))])),
        (Reason.UNKNOWN_OPERATION, "torch.abs", Session(steps=[trace(call("torch.abbs"))])),
        (Reason.UNKNOWN_OPERATION, "'os.system'", Session(steps=[trace(call("os.system"))])),
        (
            Reason.UNKNOWN_REFERENCE,
            "node 1 refers to node 7, which the session does not have",
            Session(steps=[trace(save(1, of=7))]),
        ),
        (
            Reason.UNKNOWN_REFERENCE,
            "node 1 refers to node 2, which is defined later",
            Session(steps=[trace(save(1, of=2), read(2))]),
        ),
        (
            Reason.UNKNOWN_REFERENCE,
            "node 3 refers to node 2, which is a save",
            Session(steps=[trace(read(1), save(2, of=1), save(3, of=2))]),
        ),
        (Reason.MALFORMED_SESSION, "node 0", Session(steps=[trace(read(0))])),
        (
            Reason.MALFORMED_SESSION,
            "node 1 comes after node 2",
            Session(steps=[trace(read(2)), trace(read(1))]),
        ),
        (
            Reason.MALFORMED_SESSION,
            "names no side",
            Session(steps=[trace(Node(id=1, read=Read(hook_point=HookPoint())))]),
        ),
        (Reason.MALFORMED_SESSION, "location 1", Session(steps=[trace(read(1, location=1))])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_session_that_can_not_run_is_refused(
    reason: Reason, words: str, session: Session
) -> None:
    err = refused(session)
    assert err.reason is reason
    assert words in err.message


@pytest.mark.parametrize(
    ("reason", "words", "edit"),
    [
        (
            Reason.MALFORMED_SESSION,
            "does not say how",
            lambda s: setattr(s.steps[0].trace, "mode", TraceMode.TRACE_MODE_GENERATE),
        ),
        (
            Reason.MALFORMED_SESSION,
            "set generation where the mode is generate",
            lambda s: s.steps[0].trace.generation.SetInParent(),
        ),
        (
            Reason.MALFORMED_SESSION,
            "max_new_tokens 0; it is from 1",
            lambda s: s.steps[0].trace.MergeFrom(_generating()),
        ),
        (
            Reason.MALFORMED_SESSION,
            "temperature 0.0; it is above 0",
            lambda s: s.steps[0].trace.MergeFrom(_generating(max_new_tokens=3, temperature=0)),
        ),
        (
            Reason.MALFORMED_SESSION,
            "node 1 is of step 3, and its trace has 3",
            lambda s: _generate_and_read(s, step=3),
        ),
        (
            Reason.MALFORMED_SESSION,
            "node 3 names invoke 2, and the trace has 1",
            lambda s: _generate_and_end(s, EndGeneration(when=reference(1), invoke=2)),
        ),
        (Reason.MALFORMED_SESSION, "no mode", lambda s: s.steps[0].trace.ClearField("mode")),
        (Reason.MALFORMED_SESSION, "no input", lambda s: s.steps[0].trace.ClearField("invokes")),
        (
            Reason.MALFORMED_SESSION,
            "invoke 2 of step 1",
            lambda s: s.steps[0].trace.invokes.append(Invoke(rows=[TokenRow()])),
        ),
        (
            Reason.MALFORMED_SESSION,
            "token id 100 of step 1",
            lambda s: s.steps[0].trace.invokes[0].rows[0].token_ids.append(100),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trace_with_bad_inputs_is_refused(
    reason: Reason, words: str, edit: Callable[[Session], object]
) -> None:
    err = refused(edited(edit))
    assert err.reason is reason
    assert words in err.message


@pytest.mark.parametrize(
    ("reason", "words", "session"),
    [
        (Reason.UNSUPPORTED_FEATURE, "a value of a kind", with_value(Value())),
        (Reason.MALFORMED_SESSION, "7 bytes", with_tensor(data=b"x" * 7)),
        (Reason.MALFORMED_SESSION, "17 dimensions", with_tensor(shape=[1] * 17)),
        (Reason.MALFORMED_SESSION, "[-2]", with_tensor(shape=[-2])),
        (Reason.MALFORMED_SESSION, "have a product", with_tensor(shape=[2**62, 0], data=b"")),
        (
            Reason.MALFORMED_SESSION,
            "have a product",
            with_tensor(shape=[2**40] * 2 + [0], data=b""),
        ),
        (Reason.MALFORMED_SESSION, "element type number 0", with_tensor(dtype=0)),
        (Reason.MALFORMED_SESSION, "element type number 99", with_value(Value(dtype=99))),  # type: ignore[arg-type]
        (Reason.MALFORMED_SESSION, "by content hash", with_tensor(data=None, content_hash="0")),
        (Reason.MALFORMED_SESSION, "refers to tensor 1", with_value(Value(tensor_index=1))),
        (Reason.MALFORMED_SESSION, "without elements", with_tensor(data=None, data_offset=0)),
        (Reason.MALFORMED_SESSION, "nested deeper", with_value(nested(MAX_DEPTH + 1))),
        (Reason.MALFORMED_SESSION, "ellipsis as key", with_key(Value(ellipsis={}))),  # type: ignore[arg-type]
        (Reason.MALFORMED_SESSION, "one key twice", with_key(*[Value(int_value=1)] * 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_breaks_a_rule_is_refused(
    reason: Reason, words: str, session: Session
) -> None:
    err = refused(session)
    assert err.reason is reason
    assert words in err.message
    assert "node 2" in err.message


UPLOAD = {"dtype": Dtype.DTYPE_FLOAT32, "shape": [2], "content_hash": "0" * 64}


@pytest.mark.parametrize(
    ("reason", "words", "fields"),
    [
        (Reason.MALFORMED_SESSION, "64 lowercase hexadecimal", {"content_hash": "../" + "0" * 61}),
        (Reason.MALFORMED_SESSION, "without elements", {"content_hash": None}),
        (Reason.MALFORMED_SESSION, "1 bytes", {"content_hash": None, "data": b"x"}),
        (Reason.MALFORMED_SESSION, "[-2]", {"shape": [-2]}),
        (Reason.REQUEST_TOO_LARGE, "4,294,967,300 bytes", {"shape": [2**30 + 1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_brought_tensor_that_breaks_a_rule_is_refused(
    reason: Reason, words: str, fields: dict[str, object]
) -> None:
    content = {name: field for name, field in (UPLOAD | fields).items() if field is not None}
    session = with_value(Value(tensor_index=0))
    session.tensors.append(Tensor(**content))  # type: ignore[arg-type]
    err = refused(session)
    assert err.reason is reason
    assert words in err.message


def test_a_brought_tensor_may_be_used_by_index() -> None:
    session = with_value(Value(tensor_index=0))
    session.tensors.append(Tensor(**UPLOAD))  # type: ignore[arg-type]
    validate(session, MODELS)


def test_values_may_be_nested_to_the_limit() -> None:
    validate(with_value(nested(MAX_DEPTH)), MODELS)


def test_an_error_names_the_users_line_of_its_node() -> None:
    where = SourceLocation(file="notebook.py", line=7, source="model.layrs")
    session = Session(steps=[trace(read(1, "layrs", location=1))], locations=[where])
    assert refused(session).location == Location("notebook.py", 7, "model.layrs")


def test_an_error_of_a_step_names_the_users_line_of_the_step() -> None:
    session = Session(steps=[Step(location=1)], locations=[SourceLocation(file="a.py", line=3)])
    assert refused(session).location == Location("a.py", 3)


def test_a_huge_path_does_not_make_a_huge_error() -> None:
    err = refused(Session(steps=[trace(read(1, "x" * 1_000_000))]))
    assert len(err.message) + sum(map(len, err.metadata.values())) < 1000


def test_a_session_that_is_too_large_is_refused_with_both_numbers() -> None:
    session = with_tensor(shape=[1000], data=b"x" * 4000)
    with pytest.raises(Error, match=r"4,\d\d\d bytes .* at most 1,024") as caught:
        check_size(session, 1024)
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE


def test_without_any_model_even_a_log_is_refused() -> None:
    with pytest.raises(Error, match="no model is served yet") as caught:
        validate(Session(steps=[log("x")]), {})
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_arguments_of_modules_that_run_in_process_alone_are_refused() -> None:
    session = edited(lambda it: it.steps[0].trace.invokes[0].args.tuple.SetInParent())
    with pytest.raises(InvalidTraceError, match="run in process alone"):
        validate(session, MODELS)

"""What trains is refused where it breaks a rule, trusting nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from insitu_proto.v1 import training_pb2 as training
from insitu_proto.v1.intervention_pb2 import Call, Node
from insitu_proto.v1.session_pb2 import Compute, Session, Step
from insitu_proto.v1.value_pb2 import ListValue, Value
from insitu_scheduler.models import KnownModel
from insitu_scheduler.validation import validate
from insitu_wire.errors import Error
from support.fake_shard import MODEL, describe, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

MODELS = {MODEL: KnownModel.from_description(describe(MODEL), ())}
RATE = {"lr": Value(float_value=0.1)}


def _refs(*ids: int) -> Value:
    return Value(list=ListValue(items=[reference(each) for each in ids]))


def _validate(*nodes: Node) -> None:
    made = Node(id=1, call=Call(name="torch.zeros", args=[Value(int_value=3)]))
    parameter = Node(id=2, parameter=training.Parameter(value=reference(1)))
    optimizer = Node(id=3, optimizer=training.Optimizer(name="SGD"))
    compute = Compute(nodes=[made, parameter, optimizer, *nodes])
    validate(Session(steps=[Step(compute=compute)]), MODELS)


def _step(
    parameters: Sequence[int] = (2,), optimizer: int = 3, options: dict[str, Value] = RATE
) -> Node:
    group = training.ParameterGroup(parameters=_refs(*parameters), options=options)
    step = training.OptimizerStep(optimizer=reference(optimizer), groups=[group])
    return Node(id=9, optimizer_step=step)


def _backward(**fields: Any) -> Node:
    taken = training.Backward(**{"loss": reference(2), "parameters": _refs(2), **fields})
    return Node(id=9, backward=taken)


def test_what_is_right_is_taken() -> None:
    _validate(_backward(), Node(id=10, zero_gradient=training.ZeroGradient(parameters=_refs(2))))
    _validate(_step())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node(id=9, parameter=training.Parameter()), "a parameter without a value"),
        (Node(id=9, optimizer=training.Optimizer(name="LBFGS")), "use SGD, Adam, AdamW"),
        (_step(optimizer=2), "trains a parameter; refer to the node of an optimizer"),
        (_step(parameters=[1]), "trains a call; refer to the node of a parameter"),
        (_step(parameters=[2, 2]), "one parameter twice"),
        (_step(parameters=[]), "names no parameters"),
        (_step(options={}), "SGD has no lr"),
        (
            _step(options={"lr": Value(float_value=-1)}),
            "lr of SGD is -1.0; use a number, 0 or more",
        ),
        (_step(options={"lr": reference(1)}), "lr of SGD is None"),
        (_step(options={**RATE, "betas": Value(int_value=1)}), "betas is no option of SGD"),
        (_step(options={**RATE, "nesterov": Value(int_value=1)}), "use True or False"),
        (_backward(parameters=_refs(3)), "trains a optimizer; refer to the node of a parameter"),
        (_backward(loss=Value(int_value=1)), "its loss or its value is no reference"),
        (_backward(written=[training.GradientWrite(value=reference(1))]), "has no value"),
        (_backward(loss=reference(77)), "which the session does not have"),
        (
            Node(id=9, read_gradient=training.ReadGradient(parameter=reference(1))),
            "trains a call; refer to the node of a parameter",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_a_rule_is_refused(node: Node, message: str) -> None:
    with pytest.raises(Error, match=message):
        _validate(node)

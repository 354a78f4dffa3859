"""Walks the steps of a session, however deep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Step
    from insitu_proto.v1.training_pb2 import GradientWrite
    from insitu_proto.v1.value_pb2 import Value


def all_steps(steps: Iterable[Step]) -> Iterator[Step]:
    """Yields steps and all steps inside them, in order."""
    for step in steps:
        yield step
        match step.WhichOneof("kind"):
            case "loop":
                yield from all_steps(step.loop.steps)
            case "branch":
                yield from all_steps(step.branch.steps)
                yield from all_steps(step.branch.else_steps)


def references_of(step: Step) -> Iterator[int]:
    """Yields the ids of the nodes whose values a step uses, without the steps inside it."""
    for value in _values(step):
        for part in walk(value):
            if part.HasField("reference"):
                yield part.reference.node_id
    for node in (*step.trace.nodes, *step.compute.nodes):
        if node.HasField("assign"):
            yield node.assign.node_id


def _values(step: Step) -> Iterator[Value]:
    yield from (step.loop.items, step.branch.condition, *step.log.values)
    for invoke in step.trace.invokes:
        yield from (invoke.token_ids, invoke.args, invoke.kwargs)
    yield from (condition.value for condition in step.trace.conditions)
    for node in (*step.trace.nodes, *step.compute.nodes):
        yield from values_of(node)


def values_of(node: Node) -> Iterator[Value]:  # noqa: C901 - one case a kind
    """Yields the values that a node uses."""
    match node.WhichOneof("operation"):
        case "write" | "save" | "assign" | "skip" | "keep" as kind:
            yield getattr(node, kind).value
        case "log":
            yield from node.log.values
        case "end_generation":
            yield node.end_generation.when
        case "gradient":
            yield from (node.gradient.loss, node.gradient.value, node.gradient.gradient)
            yield from _written(node.gradient.written)
        case "backward":
            yield from (node.backward.loss, node.backward.gradient, node.backward.parameters)
            yield from _written(node.backward.written)
        case "parameter":
            yield node.parameter.value
        case "read_gradient":
            yield node.read_gradient.parameter
        case "write_gradient":
            yield from (node.write_gradient.parameter, node.write_gradient.gradient)
        case "zero_gradient":
            yield node.zero_gradient.parameters
        case "optimizer_step":
            yield node.optimizer_step.optimizer
            for group in node.optimizer_step.groups:
                yield group.parameters
                yield from group.options.values()
        case "call" | "module_call" as kind:
            call = getattr(node, kind)
            yield from call.args
            yield from call.kwargs.values()


def _written(written: Iterable[GradientWrite]) -> Iterator[Value]:
    for write in written:
        yield from (write.value, write.gradient)


def trained_by(node: Node) -> Iterator[int]:
    """Yields the ids of the parameters and optimizers that a node changes."""
    match node.WhichOneof("operation"):
        case "backward" | "zero_gradient" as kind:
            values = [getattr(node, kind).parameters]
        case "read_gradient" | "write_gradient" as kind:
            values = [getattr(node, kind).parameter]
        case "optimizer_step":
            groups = node.optimizer_step.groups
            values = [node.optimizer_step.optimizer, *(group.parameters for group in groups)]
        case _:
            values = []
    for part in (part for value in values for part in walk(value)):
        if part.HasField("reference"):
            yield part.reference.node_id

"""Walks the steps of a session, however deep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Step
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


def values_of(node: Node) -> Iterator[Value]:
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
        case "call" | "module_call" as kind:
            call = getattr(node, kind)
            yield from call.args
            yield from call.kwargs.values()

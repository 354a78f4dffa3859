"""Checks how traces generate, and at which of their steps nodes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_proto.v1.trace_pb2 import TraceMode
from insitu_scheduler.refusals import malformed, unsupported
from insitu_wire.limits import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.trace_pb2 import Generation, Trace

_OF_GENERATIONS = ("generated", "end_generation")


def check_generation(trace: Trace, owner: str) -> None:
    """Checks that a trace that generates, and no other, says how.

    Raises:
        Error: what is wrong.
    """
    generates = trace.mode == TraceMode.TRACE_MODE_GENERATE
    if generates != trace.HasField("generation"):
        raise malformed(
            f"the trace of {owner} {'generates and' if generates else 'is one forward pass and'} "
            f"{'does not say' if generates else 'says'} how; set generation where the mode is "
            "generate, and there alone"
        )
    if not generates:
        return
    generation = trace.generation
    if not 1 <= generation.max_new_tokens <= MAX_NEW_TOKENS:
        raise malformed(
            f"the trace of {owner} has max_new_tokens {generation.max_new_tokens}; it is from 1 to "
            f"{MAX_NEW_TOKENS}"
        )
    for name, (fits, allowed) in _RANGES.items():
        value = getattr(generation, name)
        if generation.HasField(name) and not fits(value):  # type: ignore[arg-type]
            raise malformed(f"the trace of {owner} has {name} {value}; it is {allowed}")


def check_step(node: Node, trace: Trace) -> None:
    """Checks at which step of its trace a node is.

    Raises:
        Error: what is wrong.
    """
    kind = node.WhichOneof("operation")
    generation: Generation = trace.generation
    generates = trace.mode == TraceMode.TRACE_MODE_GENERATE
    steps = [node.step - 1] if node.step else []
    if kind in ("read", "write"):
        steps.append(getattr(node, kind).hook_point.step)
    elif kind == "skip":
        steps.append(node.skip.step)
    num_steps = generation.max_new_tokens if generates else 1
    if max(steps, default=0) >= num_steps or (node.step and not generates):
        raise malformed(
            f"node {node.id} is of step {max(steps)}, and its trace has {num_steps}; steps are "
            "counted from 0, and are there where a trace generates"
        )
    if generates and kind in ("gradient", "backward"):
        raise unsupported("it takes gradients in forward passes, and not while it generates")
    if not generates and kind in _OF_GENERATIONS:
        raise malformed(f"node {node.id} is of a generation, and its trace is one forward pass")
    if kind == "generated" and not node.generated.part:
        raise malformed(f"node {node.id} does not say what of the generation it gives")
    invoke = getattr(node, kind).invoke if kind in _OF_GENERATIONS else 0
    if invoke > len(trace.invokes):
        raise malformed(
            f"node {node.id} names invoke {invoke}, and the trace has {len(trace.invokes)}"
        )


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x > 0, "above 0"),
    "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: x > 0, "above 0"),
}

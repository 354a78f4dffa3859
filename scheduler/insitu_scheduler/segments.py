"""Cuts a session into segments: runs of consecutive steps on one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_scheduler.cost_model import Work
from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Session, Step
    from insitu_proto.v1.trace_pb2 import Trace
    from insitu_proto.v1.value_pb2 import Value

# Loops in loops multiply: an expectation above this is none.
_MAX_TIMES = 100_000
# A backward pass computes about twice what its forward pass does.
_GRADIENT_COST = 3.0


@dataclass(frozen=True, slots=True)
class SegmentRange:
    """Says which steps of a session make a segment."""

    model: str | None
    """The model that they need; None if any will do, as for log and exit alone."""
    start: int
    """Index of the first step."""
    stop: int
    """Index after the last step."""
    first_trace_number: int
    """Number of the segment's first trace in the session, from 1."""


def cut(session: Session) -> list[SegmentRange]:
    """Cuts a session's steps, in order; a step that needs no model joins the one before it."""
    segments: list[SegmentRange] = []
    model: str | None = None
    start, first_trace, traces = 0, 1, 0
    for index, step in enumerate(session.steps):
        wanted = _model(step)
        if wanted is not None and model is not None and wanted != model:
            segments.append(SegmentRange(model, start, index, first_trace))
            start, first_trace = index, traces + 1
        if wanted is not None:
            model = wanted
        traces += sum(inner.HasField("trace") for inner in all_steps([step]))
    segments.append(SegmentRange(model, start, len(session.steps), first_trace))
    return segments


def models_of(session: Session) -> list[str]:
    """Gives the models that a session uses, in order of first use."""
    return list(dict.fromkeys(segment.model for segment in cut(session) if segment.model))


def models_named(session: Session) -> set[str]:
    """Gives all names of models that a session has anywhere."""
    steps = all_steps(session.steps)
    return {name for step in steps for name in (step.trace.model, step.compute.model) if name}


def count_traces(session: Session) -> int:
    """Counts a session's traces."""
    return sum(step.HasField("trace") for step in all_steps(session.steps))


def count_tokens(session: Session) -> int:
    """Counts the tokens that a session takes through its models, as far as that is known before.

    Each step of a generation has a token a row. What a loop over values of the session repeats
    counts once, and prompts that it computes have no tokens.
    """
    return sum(times * _tokens(trace) for trace, times in _traces(session))


def work_of(session: Session, depths: Callable[[str], Mapping[str, float]]) -> Work:
    """Counts what a session asks of its models, as far as it is known before it runs.

    Each step of a generation is a pass. Tokens count by the part of the layers that they go
    through, down to the last that the trace looks at, and three times with gradients.

    Args:
        session: the session.
        depths: tells for a model which part of its layers has run, by module, as far as it is
            known.
    """
    num_passes, num_tokens = 0, 0.0
    for trace, times in _traces(session):
        num_passes += times * max(trace.generation.max_new_tokens, 1)
        num_tokens += times * _tokens(trace) * _part(trace, depths(trace.model))
    return Work(num_passes, num_tokens)


def _traces(session: Session) -> Iterator[tuple[Trace, int]]:
    """Yields a session's traces, each with how often it runs at most."""
    for step, times in _with_times(session, session.steps):
        if step.HasField("trace"):
            yield step.trace, times


def _tokens(trace: Trace) -> int:
    rows = [row for invoke in trace.invokes for row in invoke.rows]
    num_later = max(trace.generation.max_new_tokens - 1, 0)
    return sum(len(row.token_ids) for row in rows) + num_later * max(len(rows), 1)


def _part(trace: Trace, depths: Mapping[str, float]) -> float:
    """Gives what a pass of a trace takes, beside one forward pass through the whole model."""
    kinds = {node.WhichOneof("operation") for node in trace.nodes}
    part = 1.0
    if depths and not trace.HasField("generation"):
        paths = (path for node in trace.nodes if (path := _module_path(node)) is not None)
        part = max((depths.get(path, 1.0) for path in paths), default=0.0)
    return part * (_GRADIENT_COST if kinds & {"backward", "gradient"} else 1.0)


def _module_path(node: Node) -> str | None:
    """Gives where in the pass a node stands; None if nowhere."""
    match node.WhichOneof("operation"):
        case "read":
            return node.read.hook_point.module_path
        case "write":
            return node.write.hook_point.module_path
        case "skip":
            return node.skip.module_path
    return None


def _with_times(
    session: Session, steps: Iterable[Step], times: int = 1
) -> Iterator[tuple[Step, int]]:
    """Yields steps and all steps inside them, each with how often it runs at most."""
    for step in steps:
        yield step, times
        match step.WhichOneof("kind"):
            case "loop":
                often = min(times * _num_items(session, step.loop.items), _MAX_TIMES)
                yield from _with_times(session, step.loop.steps, often)
            case "branch":
                yield from _with_times(session, step.branch.steps, times)
                yield from _with_times(session, step.branch.else_steps, times)


def _num_items(session: Session, items: Value) -> int:
    """Counts what a loop is over; 1 if that is not known yet."""
    match items.WhichOneof("kind"):
        case "list" | "tuple" as kind:
            return len(getattr(items, kind).items)
        case "tensor":
            return items.tensor.shape[0]
        case "tensor_index":
            return session.tensors[items.tensor_index].shape[0]
    return 1


def _model(step: Step) -> str | None:
    models = (inner.trace.model or inner.compute.model for inner in all_steps([step]))
    return next(filter(None, models), None)

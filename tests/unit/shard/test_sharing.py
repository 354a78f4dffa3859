"""Passes are shared with whoever fits, and nobody waits longer for it than without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_proto.v1.model_pb2 import DimensionSpec, ModelDescription, Module, StructureSpec
from insitu_proto.v1.model_pb2 import TensorSpec as Tensor
from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.compiler import Fork, Limits, Outline, TraceFacts, plan_passes
from insitu_shard.engine import LoadedModel, SegmentPool, SegmentRun, load_model
from support.fake_shard import read, save, trace
from support.tiny_models import TinyModels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_proto.v1.session_pb2 import Step

# Rows of these lengths share no pass.
LENGTHS = st.sampled_from([3, 10, 40])
SEGMENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(LENGTHS, min_size=1, max_size=3)),
    min_size=2,
    max_size=5,
)
Segments = list[tuple[str, list[int]]]
"""Of each its user, and the lengths of its traces."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LoadedModel:
    return load_model("tiny", tiny.folder("llama"))


def _outline() -> Outline:
    hidden = StructureSpec(
        tensor=Tensor(
            dimensions=[
                DimensionSpec(factor=1, batch_power=1),
                DimensionSpec(factor=1, length_power=1),
                DimensionSpec(factor=8),
            ]
        )
    )
    description = ModelDescription()
    for order, path in enumerate(["", "layers.0", "layers.1", "head"], 1):
        module = Module(path=path, call_order=order, output=hidden, is_block="." in path)
        module.args.tuple.items.append(hidden)
        description.modules.append(module)
    return Outline.of(description)


FACTS = st.builds(
    lambda length, num_rows, is_alone, fits, moment: TraceFacts(
        rows=((1,) * length,) * num_rows,
        key=None if is_alone else length,
        forks=(Fork(moment, "written"),) if moment else (),
        last_moment=5,
        fits_other_lengths=fits,
    ),
    st.sampled_from([2, 3, 5, 12]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
)


@given(traces=st.lists(FACTS, min_size=1, max_size=8), max_tokens=st.integers(1, 60))
def test_the_pass_that_runs_next_is_that_of_who_is_due(
    traces: list[TraceFacts], max_tokens: int
) -> None:
    """Others are in it as far as there is room beside; they never put it off or split it."""
    limits = Limits(max_tokens=max_tokens)
    passes = list(plan_passes(traces, _outline(), limits))
    due = passes[0]
    assert due.members[0] == 0
    assert due.members == (0,) or due.fits(limits)
    assert sorted(place for each in passes for place in each.members) == list(range(len(traces)))


@given(segments=SEGMENTS)
@settings(max_examples=25, deadline=None)
def test_nobody_waits_for_more_passes_of_others_than_if_none_were_shared(
    segments: Segments, model: LoadedModel
) -> None:
    shared = _passes(model, segments, exact=False)
    alone = _passes(model, segments, exact=True)
    assert all(len(each) == 1 for each in alone)
    for number, (_, lengths) in enumerate(segments):
        for at in range(len(lengths)):
            assert _waits(shared, number, at) <= _waits(alone, number, at), (number, at)


def _passes(model: LoadedModel, segments: Segments, *, exact: bool) -> list[list[tuple[int, int]]]:
    """Runs segments beside each other; gives the traces of each pass, by segment and place."""
    pool, ran = SegmentPool(), list[list[tuple[int, int]]]()
    pool.on_pass = lambda report: ran.append([_named(at.rows) for at in report.plan.traces])
    for number, (user, lengths) in enumerate(segments):
        steps = [_step(number, at, length) for at, length in enumerate(lengths)]
        message = Segment(steps=steps, first_trace_number=1, exact=exact)
        pool.add(str(number), SegmentRun({"tiny": model}, message, values={}), user=user)
    while len(pool):
        list(pool.round())
    return ran


def _step(number: int, at: int, length: int) -> Step:
    """A trace whose first tokens tell which it is."""
    step = trace(read(2 * at + 2, "model.layers.0"), save(2 * at + 3, 2 * at + 2), model="tiny")
    step.trace.invokes[0].rows[0].token_ids[:] = [number + 1, at + 1, *[9] * (length - 2)]
    return step


def _named(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    return rows[0][0] - 1, rows[0][1] - 1


def _waits(passes: list[list[tuple[int, int]]], number: int, at: int) -> int:
    """Counts the passes before that of a trace that its segment had no part in."""
    (last,) = (place for place, each in enumerate(passes) if (number, at) in each)
    return sum(all(other != number for other, _ in each) for each in passes[:last])

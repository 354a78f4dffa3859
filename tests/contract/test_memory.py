"""Sweeps take the memory that was planned, twice the same, and no more than they may."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from insitu import LanguageModel
from insitu._brought import session_tensors
from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.compiler import Limits
from insitu_shard.engine import Saved, SegmentPool, SegmentRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_shard.engine.pool import PassReport
    from support.tiny_models import TinyModels

IDS = list(range(3, 17))
OTHERS = list(range(40, 54))


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> Any:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.session():  # has it loaded, and passes of each kind run
        _record_sweep(model)
    return model


@dataclass(frozen=True)
class Taken:
    """Bytes of tensors, beside what was there before."""

    peak: int
    left: int


def _taken(run: Callable[[], object]) -> Taken:
    """Adds up what torch allocates and frees: unlike resident memory, to the byte."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
        gc.collect()
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    del kept
    return Taken(peak, total)


def _record_sweep(model: Any) -> list[Any]:
    with model.trace(OTHERS):
        others = [layer.output[0] for layer in model.model.layers]
    logits = []
    for number, layer in enumerate(model.model.layers):
        for position in range(14):
            with model.trace(IDS):
                layer.output[0][:, position] = others[number][:, position]
                logits.append(model.lm_head.output[0, -1].save())
    return logits


def test_two_sweeps_of_one_size_take_the_same_memory_and_leave_what_they_saved(model: Any) -> None:
    def sweep() -> list[Any]:
        with model.session():
            return _record_sweep(model)

    first, second = _taken(sweep), _taken(sweep)
    assert first == second
    assert first.left == 3 * 14 * 256 * 4
    with model.session(run=False) as session:
        _record_sweep(model)
    # The clean run's states stay for as long as they are needed, beside the pass.
    states = 3 * 14 * 64 * 4
    assert first.peak <= session.explain().passes[-1].num_bytes + states


def test_values_are_freed_at_their_last_use(model: Any) -> None:
    def chain(num_links: int) -> Callable[[], object]:
        def run() -> object:
            with model.session():
                hidden: Any = None
                for _ in range(num_links):
                    with model.trace(IDS):
                        if hidden is not None:
                            model.model.layers[0].output[0][:] = hidden
                        hidden = model.model.layers[1].output[0]
                return hidden.sum().save()

        return run

    short, long = _taken(chain(3)), _taken(chain(12))
    assert (long.peak, long.left) == (short.peak, short.left)


def _run(model: Any, limits: Limits | None) -> tuple[list[torch.Tensor], list[PassReport]]:
    """Runs a sweep as a shard does, within limits; gives what it saves, and its passes."""
    with model.session(run=False) as session:
        _record_sweep(model)
    recorded = session._recorder.session
    segment = Segment(
        steps=recorded.steps,
        locations=recorded.locations,
        first_trace_number=1,
        seed=recorded.seed,
    )
    pool, reports = SegmentPool(limits), list[Any]()
    pool.on_pass = reports.append
    tensors = list(session_tensors(recorded, {}))
    pool.add("it", SegmentRun({model.name: model._local._model}, segment, {}, tensors))
    events = []
    while len(pool):
        events += [event for _, event in pool.round()]
    return [event.value for event in events if isinstance(event, Saved)], reports


@pytest.mark.parametrize(
    "limits", [Limits(max_bytes=400_000), Limits(max_tokens=64)], ids=["bytes", "tokens"]
)
def test_a_pass_that_is_too_big_is_split_and_stays_within_what_it_may_take(
    limits: Limits, model: Any
) -> None:
    expected, whole = _run(model, None)
    saved, parts = _run(model, limits)
    assert len(whole) == 2
    assert len(parts) > 4
    assert all(report.plan.num_bytes <= limits.max_bytes for report in parts)
    assert all(report.plan.num_tokens <= limits.max_tokens for report in parts)
    for one, other in zip(saved, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # Beside a pass are the states of the clean run, and what was saved.
    beside = 3 * 14 * 64 * 4 + 3 * 14 * 256 * 4
    assert _taken(lambda: _run(model, limits)).peak <= limits.max_bytes + beside


def test_a_trace_that_is_too_big_by_itself_runs_alone(model: Any) -> None:
    saved, parts = _run(model, Limits(max_bytes=1))
    assert len(parts) == len(saved) + 1


def test_a_pass_that_memory_does_not_hold_is_run_trace_by_trace(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _run(model, None)
    layer = model._local._model.modules["model.layers.1"]
    forward, shapes = layer.forward, list[torch.Size]()

    def bounded(hidden: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append(hidden.shape)
        if hidden.shape[:2].numel() > len(IDS):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden, **kwargs)

    monkeypatch.setattr(layer, "forward", bounded)
    saved, _ = _run(model, None)
    assert max(shape[:2].numel() for shape in shapes) > len(IDS)
    for one, other in zip(saved, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

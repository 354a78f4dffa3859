"""Segments beside each other: they share passes, and what happens to one is its own."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from insitu_proto.v1.session_pb2 import Step
from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.engine import (
    Finished,
    LoadedModel,
    Logged,
    Saved,
    SegmentPool,
    SegmentRun,
    TraceStarted,
    load_model,
)
from insitu_wire.errors import Error
from support.fake_shard import log, read, save, trace
from support.tiny_models import TinyModels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LoadedModel:
    return load_model("tiny", tiny.folder("llama"))


@pytest.fixture
def pool() -> SegmentPool:
    return SegmentPool()


def _run(model: LoadedModel, *steps: Step) -> SegmentRun:
    return SegmentRun({"tiny": model}, Segment(steps=steps, first_trace_number=1), values={})


def _trace(number: int = 1) -> Step:
    """A trace that saves one value."""
    node_id = 2 * number
    return trace(read(node_id, "model.layers.0"), save(node_id + 1, node_id), model="tiny")


def _longer(step: Step) -> Step:
    """A trace over a much longer prompt, which shares no pass with the others."""
    step.trace.invokes[0].rows[0].token_ids.extend([4] * 40)
    return step


def _failing_trace() -> Step:
    node = read(100, "model.layers.0")
    node.read.hook_point.call_index = 7
    return trace(node, save(101, 100), model="tiny")


def _told(pool: SegmentPool) -> list[tuple[str, type]]:
    return [(key, type(event)) for key, event in pool.round()]


def test_a_round_runs_a_pass_that_all_share_who_wait_for_one(
    model: LoadedModel, pool: SegmentPool
) -> None:
    pool.add("b", _run(model, log("before"), _trace(1), log("after"), _trace(2)))
    pool.add("a", _run(model, _trace()))
    calls = []
    hook = model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    assert _told(pool) == [
        ("b", Logged), ("b", TraceStarted), ("a", TraceStarted),
        ("b", Saved), ("b", Logged), ("b", TraceStarted), ("b", Saved),
        ("b", Finished), ("a", Saved), ("a", Finished),
    ]  # fmt: skip
    hook.remove()
    assert len(calls) == 1
    assert len(pool) == 0
    pool.add("c", _run(model, _trace()))
    assert [key for key, kind in _told(pool) if kind is Finished] == ["c"]
    assert (pool.keys, list(pool.round())) == ((), [])


def test_a_segment_of_no_trace_ends_in_one_round(model: LoadedModel, pool: SegmentPool) -> None:
    left = Step()
    left.exit.SetInParent()
    pool.add("a", _run(model, log("hello"), left))
    assert list(pool.round()) == [("a", Logged("hello")), ("a", Finished(has_exited=True))]
    assert len(pool) == 0


def test_segments_beside_each_other_save_what_each_saves_alone(
    model: LoadedModel, pool: SegmentPool
) -> None:
    (alone,) = (event for event in _run(model, _trace()).run() if isinstance(event, Saved))
    for key in "abc":
        pool.add(key, _run(model, _trace(1), _trace(2)))
    saved = [event for _, event in pool.round() if isinstance(event, Saved)]
    assert len(saved) == 6
    assert all(torch.equal(event.value[0], alone.value[0]) for event in saved)


def test_one_that_fails_leaves_and_the_others_go_on(model: LoadedModel, pool: SegmentPool) -> None:
    pool.add("bad", _run(model, _failing_trace(), _trace()))
    pool.add("good", _run(model, _trace()))
    told = [*pool.round(), *pool.round()]
    assert [key for key, _ in told] == ["bad", "good", "bad", "good", "good"]
    error = told[2][1]
    assert isinstance(error, Error)
    assert (error.reason, error.trace_number) == ("HOOK_POINT_NOT_REACHED", 1)
    assert told[-1] == ("good", Finished(has_exited=False))
    assert len(pool) == 0


def test_one_that_is_dropped_between_rounds_tells_nothing_more(
    model: LoadedModel, pool: SegmentPool
) -> None:
    for key in ("gone", "stays"):
        pool.add(key, _run(model, _trace(1), _longer(_trace(2))))
    list(pool.round())
    pool.drop("gone")
    pool.drop("gone")
    assert {key for key, _ in pool.round()} == {"stays"}


@pytest.mark.parametrize("dropped", ["first", "second"])
def test_one_that_is_dropped_within_a_round_tells_nothing_more(
    model: LoadedModel, pool: SegmentPool, dropped: str
) -> None:
    for key in ("first", "second"):
        pool.add(key, _run(model, _trace()))
    told = pool.round()
    assert next(told) == ("first", TraceStarted(1))
    pool.drop(dropped)
    assert dropped not in {key for key, _ in told}
    assert len(pool) == 0


def _whole_trace() -> Step:
    """A trace that needs every layer."""
    return trace(read(2, "lm_head"), save(3, 2), model="tiny")


@contextmanager
def _when_reached(model: LoadedModel, path: str, do: Callable[[], None]) -> Iterator[list[str]]:
    """Does something in a pass at a module; gives the layers that passes have reached."""
    reached: list[str] = []
    with ExitStack() as hooks:
        for name in sorted(model.block_paths):
            hook = model.modules[name].register_forward_hook(
                lambda *_, name=name: reached.append(name)
            )
            hooks.callback(hook.remove)
        hook = model.modules[path].register_forward_hook(lambda *_: do())
        hooks.callback(hook.remove)
        yield reached


def test_a_pass_ends_at_the_next_layer_once_all_whom_it_runs_for_are_cancelled(
    model: LoadedModel, pool: SegmentPool
) -> None:
    pool.add("gone", _run(model, _whole_trace()))
    with _when_reached(model, "model.layers.0", lambda: pool.cancel("gone")) as reached:
        assert [kind for _, kind in _told(pool)] == [TraceStarted]
    assert reached == ["model.layers.0"]
    assert pool.is_idle
    pool.drop("gone")
    assert len(pool) == 0


def test_a_pass_goes_on_for_those_who_are_not_cancelled(
    model: LoadedModel, pool: SegmentPool
) -> None:
    (alone,) = (at for at in _run(model, _whole_trace()).run() if isinstance(at, Saved))
    for key in ("gone", "stays"):
        pool.add(key, _run(model, _whole_trace()))
    with _when_reached(model, "model.layers.0", lambda: pool.cancel("gone")):
        told = list(pool.round())
    saved = [(key, at) for key, at in told if isinstance(at, Saved)]
    assert [key for key, _ in saved] == ["stays"]
    assert torch.equal(saved[0][1].value, alone.value)


def test_a_key_names_one_segment(model: LoadedModel, pool: SegmentPool) -> None:
    pool.add("a", _run(model, _trace()))
    with pytest.raises(ValueError, match="'a' runs already"):
        pool.add("a", _run(model, _trace()))


def test_a_segment_that_is_held_goes_on_where_it_was_and_the_others_do_not_notice(
    model: LoadedModel, pool: SegmentPool
) -> None:
    held = log("between"), _longer(_trace(2)), log("after")
    pool.add("held", _run(model, _trace(1), *held))
    pool.add("other", _run(model, _trace(1)))
    pool.pause("held")
    assert not pool.is_idle
    assert {key for key, _ in _told(pool)} == {"other"}
    assert pool.is_idle
    assert _told(pool) == []
    pool.pause("held", goes_on=True)
    told = [event for _ in range(3) for _, event in pool.round()]
    assert [type(event) for event in told] == [
        TraceStarted, Saved, Logged, TraceStarted, Saved, Logged, Finished,
    ]  # fmt: skip
    starts = [event.seconds for event in told if isinstance(event, TraceStarted)]
    assert 0 < starts[0] < starts[1]

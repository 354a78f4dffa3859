"""Random sessions give the same merged and one by one: values, logs, errors, in one order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from insitu import LanguageModel
from insitu._brought import session_tensors
from insitu_proto.v1.shard_service_pb2 import Segment
from insitu_shard.compiler import Limits
from insitu_shard.engine import Logged, Saved, SegmentEvent, SegmentPool, SegmentRun
from insitu_wire.errors import Error
from support.random_sessions import Outcome, run, sessions
from support.tiny_models import TinyModels

FAMILIES = {"llama": 120, "gpt2": 50, "gemma3": 50, "qwen3": 30, "mistral": 30, "mixtral": 40}
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def models(tiny: TinyModels) -> dict[str, LanguageModel]:
    return {family: LanguageModel(str(tiny.folder(family))) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_as_one_by_one(
    family: str, models: dict[str, LanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    is_exact = family != "mixtral"  # experts run on batches that depend on all rows

    @settings(
        max_examples=FAMILIES[family],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=SUPPRESSED,
    )
    @given(description=sessions)
    def check(description: list[Any]) -> None:
        logs: list[list[str]] = []
        outcomes: list[Outcome] = []
        for options in ({"exact": True}, {}):
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="insitu"):
                outcomes.append(run(models[family], description, **options))
            told = [record.getMessage() for record in caplog.records]
            logs.append([line.partition(" - ")[2] for line in told if "LOG" in line])
            note(str([line for line in told if "a pass over" in line]))
            # It would hide what is wrong with the merged one.
            assert not any("a pass over" in line for line in told)
        alone, merged = outcomes
        note(f"alone: {alone.error}, merged: {merged.error}")
        assert alone.error == merged.error
        if is_exact:
            assert logs[0] == logs[1]
        _check_equal(alone.values, merged.values, is_exact=is_exact)

    check()


def test_sessions_that_share_passes_do_not_notice(models: dict[str, LanguageModel]) -> None:
    model = models["llama"]

    @settings(
        max_examples=30,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=SUPPRESSED,
    )
    @given(descriptions=st.lists(sessions, min_size=2, max_size=4))
    def check(descriptions: list[list[Any]]) -> None:
        recorded = [run(model, description, run=False).session for description in descriptions]
        segments = [
            Segment(steps=at.steps, locations=at.locations, first_trace_number=1, seed=at.seed)
            for at in (session._recorder.session for session in recorded)
        ]
        loaded = {model.name: model._local._model}
        # Small tensors are inside their sessions; these bring no others.
        brought = [list(session_tensors(session._recorder.session, {})) for session in recorded]
        pool = SegmentPool(Limits(max_tokens=150))
        expected: dict[str, list[Any]] = {}
        for number, (segment, tensors) in enumerate(zip(segments, brought, strict=True)):
            alone = SegmentPool()
            alone.add("alone", SegmentRun(loaded, segment, {}, tensors))
            expected[str(number)] = [event for _, event in _all(alone)]
            pool.add(str(number), SegmentRun(loaded, segment, {}, tensors))
        told: dict[str, list[Any]] = {key: [] for key in expected}
        for key, event in _all(pool):
            told[key].append(event)
        for key, events in expected.items():
            assert [type(event) for event in told[key]] == [type(event) for event in events]
            for event, other in zip(events, told[key], strict=True):
                if isinstance(event, Saved) and isinstance(event.value, torch.Tensor):
                    assert torch.equal(event.value, other.value)
                elif isinstance(event, Logged | Error):
                    assert event.message == other.message

    check()


def _all(pool: SegmentPool) -> Iterator[tuple[str, SegmentEvent | Error]]:
    while len(pool):
        yield from pool.round()


def _check_equal(alone: Any, merged: Any, *, is_exact: bool, name: str = "") -> None:
    if isinstance(alone, dict):
        assert alone.keys() == merged.keys()
        for key in alone:
            _check_equal(alone[key], merged[key], is_exact=is_exact, name=key)
    elif isinstance(alone, list):
        assert len(alone) == len(merged) if _is_there(alone) else not _is_there(merged)
        if _is_there(alone):
            for one, other in zip(alone, merged, strict=True):
                _check_equal(one, other, is_exact=is_exact, name=name)
    else:
        assert _is_there(alone) == _is_there(merged), name
        if _is_there(alone) and is_exact:
            assert torch.equal(alone, merged), (name, (alone - merged).abs().max())
        elif _is_there(alone):
            torch.testing.assert_close(alone, merged, atol=1e-4, rtol=1e-4)


def _is_there(value: Any) -> bool:
    """Whether a saved value has come: not after an error, an exit or a stop before it."""
    return getattr(value, "_is_there", not type(value).__name__.endswith("Proxy"))

"""A shard group that is told to stop finishes what it runs, refuses what is new, and exits 0."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from insitu import CONFIG, LanguageModel, SessionState, Submission
from insitu_proto.v1.placement_pb2 import SHARD_GROUP_STATE_DRAINING
from support.deployment import Deployment, group_states, wait_for_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]
# A few seconds on one rank, and on two.
NUM_TRACES = 400
# As long as a group takes to start, and more.
LONGER = 1500
# More than there is time for.
ENDLESS = 3000
GRACE_SECONDS = 30
# What the end of a group takes beside what runs.
ENDING_SECONDS = 20


@pytest.fixture
def start(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Deployment]]:
    """Starts a scheduler and a shard group with flags."""
    with ExitStack() as cleanup:

        def started(*flags: str) -> Deployment:
            deployment = Deployment(tmp_path, tiny.folder("llama"), *flags)
            cleanup.callback(deployment.stop)
            monkeypatch.setenv("INSITU_ENDPOINT", deployment.endpoint)
            monkeypatch.setattr(CONFIG, "_api_key", "tests")
            wait_for_groups(1)
            return deployment

        yield started


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_runs_is_finished_and_what_is_new_waits_for_the_next_group(
    num_ranks: int, start: Callable[..., Deployment], tiny: TinyModels
) -> None:
    deployment = start("--tp", str(num_ranks), "--grace-seconds", str(GRACE_SECONDS))
    running = _submitted(NUM_TRACES)
    _wait_for(lambda: running.status() is SessionState.RUNNING)
    processes = psutil.Process(deployment.shard.pid).children(recursive=True)
    deployment.shard.terminate()
    told_at = time.monotonic()
    # Told at once, long before the session that runs has ended.
    _wait_for(lambda: group_states() == [SHARD_GROUP_STATE_DRAINING])
    refused = _submitted(1)
    assert running.status() is SessionState.RUNNING
    assert _total(running) == pytest.approx(_expected(tiny, NUM_TRACES), abs=1e-4)
    assert deployment.shard.wait(GRACE_SECONDS + ENDING_SECONDS) == 0
    assert time.monotonic() - told_at < GRACE_SECONDS + ENDING_SECONDS
    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert "is lost" not in deployment.log
    # The one that came after the signal has not run: it waits, and the next group takes it.
    assert refused.status() is SessionState.QUEUED
    deployment.start_shard()
    assert _total(refused) == pytest.approx(_expected(tiny, 1), abs=1e-4)


def test_what_is_new_goes_to_another_group_meanwhile(
    start: Callable[..., Deployment], tiny: TinyModels
) -> None:
    deployment = start("--grace-seconds", str(GRACE_SECONDS))
    deployment.start_shard()
    # On the first, for the second is not there yet.
    running = _submitted(LONGER)
    _wait_for(lambda: running.status() is SessionState.RUNNING)
    wait_for_groups(2)
    deployment.shard.terminate()
    _wait_for(lambda: SHARD_GROUP_STATE_DRAINING in group_states())
    assert _total(_submitted(1)) == pytest.approx(_expected(tiny, 1), abs=1e-4)
    assert len(_total(running)) == 64
    assert deployment.shard.wait(GRACE_SECONDS + ENDING_SECONDS) == 0
    assert "is lost" not in deployment.log


def test_what_does_not_end_within_the_grace_is_run_again_elsewhere_and_the_group_exits_0(
    start: Callable[..., Deployment],
) -> None:
    deployment = start("--grace-seconds", "1")
    running = _submitted(ENDLESS)
    _wait_for(lambda: running.status() is SessionState.RUNNING)
    deployment.shard.terminate()
    assert deployment.shard.wait(1 + ENDING_SECONDS) == 0
    _wait_for(lambda: running.status() is SessionState.QUEUED)
    deployment.start_shard()
    _wait_for(lambda: running.status() is SessionState.RUNNING)
    running.cancel()
    _wait_for(lambda: running.status() is SessionState.CANCELLED)


def _submitted(num_traces: int) -> Submission:
    model = LanguageModel("tiny/llama")
    with model.session(remote=True, blocking=False) as session:
        _record(model, num_traces)
    return session.submission


def _record(model: LanguageModel, num_traces: int) -> torch.Tensor:
    """Records traces that each need the one before, so that they can not share passes."""
    total = torch.zeros(64)
    for _ in range(num_traces):
        with model.trace(IDS):
            layers = model.model.layers
            layers[0].output[0][:, -1, :] = layers[0].output[0][:, -1, :] + total
            total = layers[2].output[0][0, -1, :] * 0.1
    saved: torch.Tensor = total.save()
    return saved


def _total(submission: Submission) -> list[float]:
    (total,) = submission.result(timeout=GRACE_SECONDS + 60).values()
    values: list[float] = total.tolist()
    return values


def _expected(tiny: TinyModels, num_traces: int) -> list[float]:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.session():
        total = _record(model, num_traces)
    values: list[float] = total.tolist()
    return values


def _wait_for(has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not has_happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)

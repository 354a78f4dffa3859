"""A rank that hangs ends its group, which comes back; sessions are run again."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from insitu import CONFIG, LanguageModel, SessionState, Submission
from support.deployment import Deployment, wait_for_groups
from support.up import Up, ranks

if TYPE_CHECKING:
    from pathlib import Path

    from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


# torch gives a rank that hangs half a minute to end.
@pytest.mark.timeout(600)
def test_a_follower_that_hangs_costs_no_session(
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("INSITU_COLLECTIVE_TIMEOUT_SECONDS", "3")
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    caplog.set_level(logging.INFO, "insitu")
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"], ["--tp", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        model = LanguageModel("tiny/llama")
        expected = _logits(model)
        _follower(up).suspend()
        assert torch.equal(_logits(model), expected)
        assert "the ranks of tiny/llama were started again, time 1" in up.log
        assert len(re.findall("What ran your session was lost", caplog.text)) == 1
        assert re.search(r"session \S+ is lost: .*a rank did not answer", up.log)


@pytest.mark.timeout(600)
def test_a_follower_whose_memory_alone_is_full_costs_no_session(
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "insitu")
    monkeypatch.setenv("INSITU_COLLECTIVE_TIMEOUT_SECONDS", "5")
    # What has been freed goes back to the system, so that no rank has a store to live on.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"], ["--tp", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        model = LanguageModel("tiny/llama")
        rows = [IDS * 8] * 64
        expected = _logits(model, rows)
        follower = _follower(up)
        held = follower.memory_info().vms
        follower.rlimit(psutil.RLIMIT_AS, (held, held))
        assert torch.equal(_logits(model, rows), expected)
        assert "the ranks of tiny/llama were started again, time 1" in up.log
        why = r"rank 1 could not go on: .*([Mm]emory|MemoryError)"
        assert re.search(rf"session \S+ is lost: .*{why}", up.log)
        assert re.search(rf"What ran your session was lost \({why}.*for attempt 2", caplog.text)


@pytest.mark.parametrize(
    ("number", "why"),
    [(1, "rank 1 was killed, as the system does"), (0, "its leader (has left|does not answer)")],
    ids=["follower", "leader"],
)
def test_a_rank_that_is_killed_is_named_to_the_user_and_in_the_log(
    number: int,
    why: str,
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    caplog.set_level(logging.INFO, "insitu")
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"], ["--tp", "2"]) as up:
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        submission = _long_session(LanguageModel("tiny/llama"))
        while submission.status() is not SessionState.RUNNING:
            time.sleep(0.05)
        (rank,) = ranks(up.descendants(), number)
        rank.kill()
        assert len(submission.result(timeout=120)) == 1
        assert re.search(rf"session {submission.id} is lost: .*{why}", up.log)
    assert re.search(rf"What ran your session was lost \({why}.*for attempt 2", caplog.text)


def test_a_group_that_is_not_started_again_ends_with_how_its_rank_did(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--tp", "2", "--max-restarts", "0")
    deployment = Deployment(tmp_path, tiny.folder("llama"), *flags)
    monkeypatch.setenv("INSITU_ENDPOINT", deployment.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    try:
        wait_for_groups(1)
        processes = psutil.Process(deployment.shard.pid).children(recursive=True)
        (follower,) = ranks(processes, 1)
        follower.kill()
        assert deployment.shard.wait(60) == 1
        assert not psutil.wait_procs(processes, timeout=5)[1]
        why = "insitu shard: rank 1 of 2 was killed by signal 9, as the system does where memory"
        assert why in deployment.log
    finally:
        deployment.stop()


def _long_session(model: LanguageModel) -> Submission:
    """Many traces that each need the one before."""
    with model.session(remote=True, blocking=False) as session:
        total = torch.zeros(64)
        for _ in range(500):
            with model.trace(IDS):
                layers = model.model.layers
                layers[0].output[0][:, -1, :] = layers[0].output[0][:, -1, :] + total
                total = layers[2].output[0][0, -1, :] * 0.1
        total.save()
    return session.submission


def _logits(model: LanguageModel, ids: object = IDS) -> torch.Tensor:
    with model.trace(ids, remote=True):
        logits: torch.Tensor = model.lm_head.output.save()
    return logits


def _follower(up: Up) -> psutil.Process:
    (follower,) = ranks(up.descendants(), 1)
    return follower

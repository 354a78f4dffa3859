"""A rank that hangs ends its group, which comes back; sessions are run again."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from insitu import CONFIG, LanguageModel
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
        # With the reason.
        assert re.search(r"session \S+ is lost: .*RuntimeError", up.log)


@pytest.mark.timeout(600)
def test_a_follower_whose_memory_alone_is_full_costs_no_session(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert re.search(r"session \S+ is lost: ", up.log)


def _logits(model: LanguageModel, ids: object = IDS) -> torch.Tensor:
    with model.trace(ids, remote=True):
        logits: torch.Tensor = model.lm_head.output.save()
    return logits


def _follower(up: Up) -> psutil.Process:
    (follower,) = ranks(up.descendants(), 1)
    return follower

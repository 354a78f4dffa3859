"""Processes are killed while sessions run; every session ends once, with the undisturbed result."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import torch

import insitu
from insitu import CONFIG, LanguageModel
from support.deployment import Deployment, wait_for_groups

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]
NUM_TRACES = 500
LONGER = 4 * NUM_TRACES
# Shown after a second at the earliest.
HALFWAY = r"trace (\d\d+) of"


@pytest.fixture
def plain(tiny: TinyModels) -> LanguageModel:
    """The same model in this process."""
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture
def deployment(
    tmp_path: Path,
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Deployment]:
    with ExitStack() as cleanup:
        deployment = Deployment(tmp_path, tiny.folder("llama"))
        cleanup.callback(deployment.stop)
        monkeypatch.setenv("INSITU_ENDPOINT", deployment.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        caplog.set_level(logging.INFO, "insitu")
        yield deployment


def test_sessions_outlive_the_scheduler_and_the_shard_group_that_run_them(
    deployment: Deployment, plain: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_groups(1)
    expected = [_session(plain, number, remote=False) for number in range(4)]
    model = LanguageModel("tiny/llama")
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(_session, model, number, remote=True) for number in range(4)]
        _wait_for(caplog, HALFWAY)
        deployment.kill(deployment.scheduler)
        deployment.scheduler = deployment.start_scheduler()
        _wait_for(caplog, HALFWAY, after="for attempt 2")
        deployment.kill(deployment.shard)
        deployment.shard = deployment.start_shard()
        found = [session.result(timeout=120) for session in running]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_training_begins_again_where_the_group_that_runs_it_is_lost(
    deployment: Deployment, plain: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the first attempt is left: neither parameters nor an optimizer's averages."""
    wait_for_groups(1)
    expected = _trained(plain, remote=False)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(_trained, LanguageModel("tiny/llama"), remote=True)
        _wait_for(caplog, HALFWAY)
        deployment.kill(deployment.shard)
        deployment.shard = deployment.start_shard()
        found = running.result(timeout=120)
    assert "for attempt 2" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_server_that_is_told_to_stop_keeps_what_runs_for_the_next(
    deployment: Deployment, plain: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_groups(1)
    model = LanguageModel("tiny/llama")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(_session, model, 1, remote=True, num_traces=LONGER)
        _wait_for(caplog, HALFWAY)
        deployment.scheduler.terminate()
        deployment.scheduler.wait(40)
        deployment.scheduler = deployment.start_scheduler()
        found = running.result(timeout=120)
    assert "is kept, and is run again" in caplog.text
    assert torch.equal(found, _session(plain, 1, remote=False, num_traces=LONGER))


def _session(
    model: LanguageModel, number: int, *, remote: bool, num_traces: int = NUM_TRACES
) -> torch.Tensor:
    """Many traces that each need the one before, so that they can not share passes."""
    with model.session(remote=remote):
        total = torch.zeros(64)
        for _ in range(num_traces):
            with model.trace([number + 1, *IDS]):
                layers = model.model.layers
                layers[0].output[0][:, -1, :] = layers[0].output[0][:, -1, :] + total
                total = layers[2].output[0][0, -1, :] * 0.1
        result: torch.Tensor = total.save()
    return result


def _trained(model: LanguageModel, *, remote: bool) -> list[torch.Tensor]:
    """A steering vector and what its loss was, after many steps."""
    with model.session(remote=remote) as session:
        vector = session.parameter(torch.zeros(64))
        optimizer = insitu.optim.Adam([vector], lr=1e-2)
        for step in range(NUM_TRACES):
            with model.trace([1 + step % 7, *IDS]):
                model.blocks[1].output[:] += vector
                loss = -model.unembed.output[0, -1].log_softmax(-1)[7]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        result = [vector.save(), loss.save()]
    return [tensor.detach() for tensor in result]


def _wait_for(caplog: pytest.LogCaptureFixture, pattern: str, *, after: str = "") -> None:
    """Waits until a message fits, of those that come after some text."""
    deadline = time.monotonic() + 180
    while not re.search(f"(?s){after}.*{pattern}", caplog.text):
        assert time.monotonic() < deadline, f"nothing said {pattern!r}"
        time.sleep(0.02)

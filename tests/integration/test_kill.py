"""Processes are killed while sessions run; every session ends once, with the undisturbed result."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import insitu
from insitu import CONFIG, LanguageModel, UnavailableError
from insitu.backends.remote import RemoteBackend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]
NUM_TRACES = 500
LONGER = 4 * NUM_TRACES
# Shown after a second at the earliest.
HALFWAY = r"trace (\d\d+) of"


class Deployment:
    """A scheduler and a shard group, each a process of its own that may be killed."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.port = _free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self._folder, self._model = folder, model
        self._log = (folder / "log").open("w")
        self.scheduler = self.start_scheduler()
        self.shard = self.start_shard()

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        flags = ["--port", str(self.port), "--data-dir", str(self._folder), "--metrics-port", "-1"]
        flags += ["--grace-seconds", "0.5"]
        return self._start("insitu_scheduler", *flags)

    def start_shard(self) -> subprocess.Popen[bytes]:
        model = f"tiny/llama={self._model}"
        return self._start("insitu_shard", "--model", model, "--scheduler", self.endpoint)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.wait()

    def stop(self) -> None:
        for process in (self.shard, self.scheduler):
            process.terminate()
            process.wait(30)
        self._log.close()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log)


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
    _wait_until_ready()
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
    _wait_until_ready()
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
    _wait_until_ready()
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


def _wait_until_ready() -> None:
    backend = RemoteBackend(CONFIG)
    deadline = time.monotonic() + 180
    while True:
        assert time.monotonic() < deadline, "the shard group did not register"
        with suppress(UnavailableError):
            if backend.server_state().groups:
                break
        time.sleep(0.1)
    backend.close()


def _wait_for(caplog: pytest.LogCaptureFixture, pattern: str, *, after: str = "") -> None:
    """Waits until a message fits, of those that come after some text."""
    deadline = time.monotonic() + 180
    while not re.search(f"(?s){after}.*{pattern}", caplog.text):
        assert time.monotonic() < deadline, f"nothing said {pattern!r}"
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

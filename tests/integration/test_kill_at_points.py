"""A scheduler is killed at each point of sessions' lives: no session and no event is lost."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import insitu
from insitu import CONFIG, LanguageModel, UnavailableError
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1.event_pb2 import EventKind
from support import chaos, dying_scheduler
from support.dying_scheduler import Point
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu import Submission
    from insitu_proto.v1.event_pb2 import Event
    from support.tiny_models import TinyModels

MODEL = "tiny/llama"
NUM_TRACES = 40


class Supervised:
    """A scheduler that dies at a point, and is started again, and a group that stays."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._port = free_port()
        self.endpoint = f"127.0.0.1:{self._port}"
        self.fuse = folder / "fuse"
        self._folder = folder
        self._log = (folder / "log").open("a")
        self._point = Point.NONE
        self._is_stopping = False
        self._scheduler = self._start_scheduler()
        arguments = ["--model", f"{MODEL}={model}", "--scheduler", self.endpoint]
        self._group = self._start("-m", "insitu_shard", *arguments, "--max-sessions", "1")
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def die_at(self, point: Point) -> None:
        """Has the scheduler die once it comes to a point."""
        self._point = point
        self._scheduler.terminate()
        self._scheduler.wait(60)
        _wait_for_group()
        self.fuse.touch()

    def stop(self) -> None:
        self._is_stopping = True
        self._supervisor.join()
        for process in (self._group, self._scheduler):
            process.terminate()
            process.wait(60)
        self._log.close()

    def _supervise(self) -> None:
        while not self._is_stopping:
            if self._scheduler.poll() is not None:
                self._scheduler = self._start_scheduler()
            time.sleep(0.05)

    def _start_scheduler(self) -> subprocess.Popen[bytes]:
        arguments = ["--port", str(self._port), "--data-dir", str(self._folder)]
        arguments += ["--metrics-port", "-1", "--grace-seconds", "0.5"]
        return self._start(dying_scheduler.__file__, self._point, str(self.fuse), *arguments)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModels) -> Iterator[Supervised]:
    with pytest.MonkeyPatch.context() as patch:
        supervised = Supervised(tmp_path_factory.mktemp("data"), tiny.folder("llama"))
        patch.setenv("INSITU_ENDPOINT", supervised.endpoint)
        patch.setattr(CONFIG, "_api_key", "tests")
        try:
            _wait_for_group()
            yield supervised
        finally:
            supervised.stop()


@pytest.fixture(scope="module")
def expected(tiny: TinyModels) -> list[torch.Tensor]:
    plain = LanguageModel(str(tiny.folder("llama")))
    return [chaos.session(plain, kind, num_traces=NUM_TRACES, remote=False) for kind in range(4)]


@pytest.fixture(autouse=True)
def _endpoint(supervised: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", supervised.endpoint)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", [at for at in Point if at is not Point.NONE])
def test_nothing_is_lost(
    supervised: Supervised,
    expected: list[torch.Tensor],
    point: Point,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "insitu")
    shown = chaos.Shown()
    logging.getLogger("insitu").addHandler(shown)
    model = LanguageModel(MODEL)
    done = _submit(model, 0)
    assert torch.equal(done.result()["result"], expected[0])

    supervised.die_at(point)
    submissions = [_submit(model, kind) for kind in (1, 2, 3)]
    found = [one.result(timeout=120)["result"] for one in submissions]

    logging.getLogger("insitu").removeHandler(shown)
    assert not supervised.fuse.exists(), "it has not come to the point"
    for one, wanted in zip(found, expected[1:], strict=True):
        assert torch.equal(one, wanted)
    assert torch.equal(insitu.fetch(done.id)["result"], expected[0])
    backend = RemoteBackend(CONFIG)
    logs = [
        [response.event for response in backend.events(one.id, after=0, timeout=30)]
        for one in submissions
    ]
    backend.close()
    for one, events in zip(submissions, logs, strict=True):
        chaos.check_events(events, shown.lines[one.id])
    starts = [_last_start(events) for events in logs]
    assert starts == sorted(starts)


def _submit(model: LanguageModel, kind: int) -> Submission:
    weights = chaos.weights_of(kind)
    with model.session(remote=True, blocking=False) as session:
        chaos.record(model, session, kind, weights, num_traces=NUM_TRACES)
    return session.submission


def _last_start(events: list[Event]) -> int:
    """When its last attempt began to run."""
    kinds = [event.kind for event in events]
    last_wait = len(kinds) - 1 - kinds[::-1].index(EventKind.EVENT_KIND_QUEUED)
    nanoseconds: int = events[last_wait + 1].time.ToNanoseconds()
    return nanoseconds


def _wait_for_group() -> None:
    backend = RemoteBackend(CONFIG)
    deadline = time.monotonic() + 120
    while True:
        with suppress(UnavailableError):
            if backend.server_state().groups:
                break
        assert time.monotonic() < deadline, "the shard group has not registered"
        time.sleep(0.1)
    backend.close()

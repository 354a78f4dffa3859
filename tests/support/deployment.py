"""A scheduler and shard groups, each a process of its own that may be told to stop, or killed."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from insitu import CONFIG, UnavailableError
from insitu.backends.remote import RemoteBackend
from support.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "tiny/llama"


class Deployment:
    """A scheduler and one shard group at first; `stop` ends all that was started."""

    def __init__(self, folder: Path, model: Path, *flags: str) -> None:
        """Starts both.

        Args:
            folder: where the scheduler keeps what it has, and where all that they print goes.
            model: the folder of what is served as tiny/llama.
            flags: more flags of the shard groups.
        """
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self._folder, self._model, self._flags = folder, model, flags
        self._log = (folder / "log").open("w")
        self._schedulers: list[subprocess.Popen[bytes]] = []
        self._shards: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start_scheduler()
        self.shard = self.start_shard()

    @property
    def log(self) -> str:
        """What all processes have printed."""
        return (self._folder / "log").read_text()

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        flags = ["--port", str(self.port), "--data-dir", str(self._folder), "--metrics-port", "-1"]
        flags += ["--grace-seconds", "0.5"]
        return self._start(self._schedulers, "insitu_scheduler", *flags)

    def start_shard(self) -> subprocess.Popen[bytes]:
        model = f"{MODEL}={self._model}"
        flags = ["--model", model, "--scheduler", self.endpoint, *self._flags]
        return self._start(self._shards, "insitu_shard", *flags)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.wait()

    def stop(self) -> None:
        for process in (*self._shards, *self._schedulers):
            process.terminate()
            process.wait(30)
        self._log.close()

    def _start(
        self, started: list[subprocess.Popen[bytes]], module: str, *arguments: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        started.append(process)
        return process


def group_states() -> list[int]:
    """Asks the server for the states of its shard groups, as `ShardGroupState` has them."""
    backend = RemoteBackend(CONFIG)
    try:
        return [group.state for group in backend.server_state().groups]
    finally:
        backend.close()


def wait_for_groups(number: int) -> None:
    """Waits until the server has so many shard groups."""
    deadline = time.monotonic() + 180
    while True:
        assert time.monotonic() < deadline, f"there are not {number} shard groups"
        with suppress(UnavailableError):
            if len(group_states()) == number:
                return
        time.sleep(0.1)

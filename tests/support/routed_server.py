"""A scheduler and a shard group, each behind a proxy that keeps what crosses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.ports import free_port
from support.up import insitu

if TYPE_CHECKING:
    from pathlib import Path

    from support.recording_proxy import RecordingProxy

_PYTHON = [sys.executable, "-m"]


@dataclass
class RoutedServer:
    """A context manager that gives the address of the scheduler's proxy."""

    model: str
    """As NAME=PATH."""
    data_dir: Path
    to_scheduler: RecordingProxy
    to_shard: RecordingProxy
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> str:
        with ExitStack() as on_failure:
            on_failure.callback(self.__exit__)
            address = self._start_all()
            on_failure.pop_all()
        return address

    def _start_all(self) -> str:
        self._start("insitu_scheduler", "--port", "0", "--data-dir", str(self.data_dir))
        address_file = self.data_dir / "scheduler.json"
        while not address_file.exists():
            time.sleep(0.05)
        scheduler = json.loads(address_file.read_text())["address"]
        self.to_scheduler.target = scheduler
        self.start_shard()
        name = self.model.partition("=")[0]
        deadline = time.monotonic() + 120
        while name not in insitu("status", INSITU_ENDPOINT=scheduler, INSITU_API_KEY="t").stdout:
            assert time.monotonic() < deadline, f"{name} is not served"
            time.sleep(0.2)
        return self.to_scheduler.address

    def start_shard(self) -> None:
        port = free_port()
        self.to_shard.target = f"127.0.0.1:{port}"
        flags = ["--scheduler", self.to_scheduler.target, "--port", str(port)]
        flags += ["--advertise-address", self.to_shard.address]
        self._start("insitu_shard", "--model", self.model, *flags)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(60)

    def _start(self, module: str, *flags: str) -> None:
        quiet = subprocess.DEVNULL
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [*_PYTHON, module, *flags]
        self._processes.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env))

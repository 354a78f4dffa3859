"""`insitu up`: a scheduler and shard groups as processes of one machine, all or none."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu._config import Config
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1 import placement_pb2
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

_POLL_SECONDS = 0.2
_STOP_SECONDS = 40.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class UpConfig:
    """What `insitu up` starts."""

    models: tuple[str, ...]
    """Each "ID" or "ID=PATH"."""
    tp: int
    """Ranks of each model's shard group."""
    port: int
    """The scheduler's port; 0 takes a free one."""
    data_dir: Path
    """Folder of the journal and of results."""
    api_keys_file: Path | None = None
    """File of lines USER:KEY."""
    dtype: str = ""
    """Element type of weights; by default as stored."""


@dataclass(slots=True)
class Deployment:
    """The processes of one `insitu up`."""

    config: UpConfig
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    is_stopping: bool = False

    def run(self) -> int:
        """Starts everything, waits for a signal or for a process to end, ends everything.

        Returns:
            The exit status: 0 after a signal, 1 if a process ended by itself.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            address = self._start_scheduler()
            self._start_shards(address)
            self._wait_until_ready(address)
            if not self.is_stopping:
                print(f"insitu is ready at {address}", flush=True)
            while not self.is_stopping:
                self._check_processes()
                time.sleep(_POLL_SECONDS)
        except Error as err:
            if not self.is_stopping:
                print(f"insitu up: {err}", file=sys.stderr)
                return 1
        finally:
            self._stop()
        return 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_stopping = True

    def _start_scheduler(self) -> str:
        address_file = self.config.data_dir / "scheduler.json"
        address_file.unlink(missing_ok=True)
        arguments = ["--port", str(self.config.port), "--data-dir", str(self.config.data_dir)]
        if self.config.api_keys_file:
            arguments += ["--api-keys-file", str(self.config.api_keys_file)]
        self._start("scheduler", "insitu_scheduler", arguments)
        while not address_file.is_file():
            self._check_processes()
            time.sleep(_POLL_SECONDS / 4)
        address: str = json.loads(address_file.read_text())["address"]
        return address

    def _start_shards(self, scheduler: str) -> None:
        for model in self.config.models:
            name = model.partition("=")[0]
            arguments = ["--model", model, "--scheduler", scheduler, "--tp", str(self.config.tp)]
            arguments += ["--metrics-port", "0", "--port", "0"]
            if self.config.dtype:
                arguments += ["--dtype", self.config.dtype]
            self._start(f"the shard group of {name}", "insitu_shard", arguments)

    def _start(self, name: str, module: str, arguments: list[str]) -> None:
        # In a session of its own: Ctrl-C reaches this process only, which ends the others in order.
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def _wait_until_ready(self, address: str) -> None:
        wanted = {model.partition("=")[0] for model in self.config.models}
        backend = RemoteBackend(self._client_config(address))
        try:
            while not self.is_stopping and wanted - _ready_models(backend):
                self._check_processes()
                time.sleep(_POLL_SECONDS)
        finally:
            backend.close()

    def _client_config(self, address: str) -> Config:
        config = Config()
        config.set_default_endpoint(address)
        config.set_default_api_key("insitu-up")
        if self.config.api_keys_file:
            lines = self.config.api_keys_file.read_text().splitlines()
            entries = [line for line in lines if line.strip() and not line.startswith("#")]
            config.set_default_api_key(entries[0].partition(":")[2].strip())
        return config

    def _check_processes(self) -> None:
        """Raises if a process has ended."""
        for name, process in self.processes.items():
            if (status := process.poll()) is not None:
                raise error(
                    Reason.REPLICA_LOST,
                    f"{name} ended with status {status}; what it printed above says why",
                    process=name,
                    status=status,
                )

    def _stop(self) -> None:
        """Ends the shard groups, then the scheduler, and whatever is left of them by force."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"insitu up: process {process.pid} does not end; killing it", file=sys.stderr)
            _kill_session(process.pid)
            process.wait()


def _ready_models(backend: RemoteBackend) -> set[str]:
    ready = placement_pb2.SHARD_GROUP_STATE_READY
    return {group.group.model for group in backend.server_state().groups if group.state == ready}


def _end_with_parent() -> None:
    """Runs in the child: asks Linux for SIGTERM should `insitu up` itself be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_session(leader_pid: int) -> None:
    """Kills what is left of a child's process group."""
    try:
        os.killpg(leader_pid, signal.SIGKILL)
    except ProcessLookupError:
        return

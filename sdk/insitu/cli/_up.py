"""`insitu up`: a scheduler and shard groups as processes of one machine, kept running."""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu._config import Config
from insitu.backends.remote import RemoteBackend
from insitu.cli._monitoring import Monitoring
from insitu_proto.v1 import placement_pb2
from insitu_wire.errors import Error, Reason, error
from insitu_wire.supervised import SupervisedProcess

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

_POLL_SECONDS = 0.2
_STOP_SECONDS = 40.0


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
    """File of API keys."""
    dtype: str = ""
    """Element type of weights; by default as stored."""
    replicas: int = 1
    """Shard groups of each model."""
    max_loaded: int | None = None
    """How many of the models fit into memory at once; None for all of them."""
    has_monitoring: bool = False
    """Whether Prometheus is started beside it."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--replicas is {self.replicas}; it is the number of shard groups of each model, 1 "
                "or more",
                replicas=self.replicas,
            )
        if self.max_loaded is not None and self.max_loaded < 1:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--max-loaded is {self.max_loaded}; it is how many models fit into memory at "
                "once, 1 or more",
                maxLoaded=self.max_loaded,
            )
        if self.max_loaded is not None and self.replicas > 1:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--replicas is {self.replicas} and --max-loaded {self.max_loaded}; a model that "
                "is loaded when it is asked for has one shard group: leave one of the two out",
            )


@dataclass(slots=True)
class Deployment:
    """The processes of one `insitu up`."""

    config: UpConfig
    processes: dict[str, SupervisedProcess] = field(default_factory=dict)
    is_stopping: bool = False
    operator_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Its own key, of which the scheduler is told the hash."""
    monitoring: Monitoring | None = None
    join_token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """What its shard groups know, and no others."""

    def run(self) -> int:
        """Starts everything, keeps it running until a signal, ends everything.

        A process that ends by itself, once all were ready, is started again.

        Returns:
            The exit status: 0 after a signal, 1 if a process can not be kept running.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            if self.config.has_monitoring:
                self.monitoring = Monitoring(self.config.data_dir / "monitoring")
            address = self._start_scheduler()
            if self.config.max_loaded is None:
                self._start_shards(address)
            else:
                self._start_host(address, self.config.max_loaded)
            self._wait_until_ready(address)
            if not self.is_stopping:
                print(f"insitu is ready at {address}", flush=True)
            self._start_monitoring()
            while not self.is_stopping:
                self._restart_ended()
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
        arguments = ["--data-dir", str(self.config.data_dir), "--port", str(self.config.port)]
        if self.config.api_keys_file:
            arguments += ["--api-keys-file", str(self.config.api_keys_file)]
        digest = hashlib.sha256(self.operator_key.encode()).hexdigest()
        arguments += ["--operator-key-sha256", digest]
        arguments += ["--metrics-port", self._metrics_port("insitu-scheduler")]
        self._start("scheduler", "insitu_scheduler", arguments)
        while not address_file.is_file():
            self._check_processes()
            time.sleep(_POLL_SECONDS / 4)
        address: str = json.loads(address_file.read_text())["address"]
        # Should it be started again, clients and shard groups find it where it was.
        port = arguments.index("--port") + 1
        arguments[port] = address.rpartition(":")[2]
        return address

    def _start_shards(self, scheduler: str) -> None:
        for model in self.config.models:
            name = model.partition("=")[0]
            arguments = ["--model", model, "--scheduler", scheduler, "--tp", str(self.config.tp)]
            arguments += ["--port", "0"]
            if self.config.dtype:
                arguments += ["--dtype", self.config.dtype]
            for number in range(1, self.config.replicas + 1):
                which = f" {number}" if self.config.replicas > 1 else ""
                metrics = ["--metrics-port", self._metrics_port("insitu-shard")]
                group = f"shard group{which} of {name}"
                self._start(group, "insitu_shard", [*arguments, *metrics])

    def _start_host(self, scheduler: str, max_loaded: int) -> None:
        arguments = [part for model in self.config.models for part in ("--model", model)]
        arguments += ["--max-loaded", str(max_loaded), "--scheduler", scheduler]
        arguments += ["--tp", str(self.config.tp)]
        if self.config.dtype:
            arguments += ["--dtype", self.config.dtype]
        self._start("host", "insitu_shard.host", arguments)

    def _metrics_port(self, job: str) -> str:
        """Gives the port for the metrics of a process: a free one, that Prometheus knows."""
        return str(self.monitoring.add_target(job) if self.monitoring else 0)

    def _start_monitoring(self) -> None:
        if self.monitoring is None or self.is_stopping:
            return
        self._start("Prometheus", "insitu.cli._monitoring", self.monitoring.arguments())
        print(f"Prometheus is at {self.monitoring.url}", flush=True)

    def _start(self, name: str, module: str, arguments: list[str]) -> None:
        process = SupervisedProcess("insitu up", module, arguments)
        process.variables["INSITU_JOIN_TOKEN"] = self.join_token
        self.processes[name] = process
        self.processes[name].start()

    def _wait_until_ready(self, address: str) -> None:
        names = [model.partition("=")[0] for model in self.config.models]
        wanted = Counter(names * self.config.replicas)
        backend = RemoteBackend(self._client_config(address))
        try:
            while not self.is_stopping and not self._is_ready(backend, wanted):
                self._check_processes()
                time.sleep(_POLL_SECONDS)
        finally:
            backend.close()

    def _is_ready(self, backend: RemoteBackend, wanted: Counter[str]) -> bool:
        """Whether sessions can be sent: all groups are there, or who will start them."""
        if self.config.max_loaded is not None:
            return bool(backend.server_state().hosts)
        return not wanted - _ready_groups(backend)

    def _client_config(self, address: str) -> Config:
        config = Config()
        config.set_default_endpoint(address)
        config.set_default_api_key(self.operator_key)
        return config

    def _check_processes(self) -> None:
        """Raises if a process has ended."""
        for name, child in self.processes.items():
            if (status := child.process.poll()) is not None:
                raise error(
                    Reason.REPLICA_LOST,
                    f"the {name} ended with status {status}; what it printed above says why",
                    process=name,
                    status=status,
                )

    def _restart_ended(self) -> None:
        """Starts again what has ended; raises if that is in vain."""
        for name, child in self.processes.items():
            if not child.restart_if_ended(f"the {name}"):
                raise error(
                    Reason.REPLICA_LOST,
                    f"the {name} ends again and again; what it printed above says why",
                    process=name,
                )

    def _stop(self) -> None:
        """Ends the shard groups, then the scheduler, and whatever is left of them by force."""
        for child in reversed(self.processes.values()):
            child.stop(_STOP_SECONDS)


def _ready_groups(backend: RemoteBackend) -> Counter[str]:
    ready = placement_pb2.SHARD_GROUP_STATE_READY
    groups = backend.server_state().groups
    return Counter(group.group.model for group in groups if group.state == ready)

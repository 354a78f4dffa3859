"""A cluster of one machine: what pods would run, as processes, behind the ports of Services."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.manifests import Pod, entry_point
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from support.manifests import Manifests


# What a pod of a GPU overlay is told besides, to run where there is none.
ONE_CPU_RANK = {"INSITU_TP": "1", "INSITU_REQUIRE_GPUS": "false"}


class ServicePort:
    """A port of a Service: each connection goes on to a pod that is ready."""

    def __init__(self, find_pod: Callable[[], int | None]) -> None:
        """Listens on a free port.

        Args:
            find_pod: gives the port of a pod that is ready; None if none is.
        """
        self._find_pod = find_pod
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no further connections."""
        # The thread that accepts is woken by this, and not by close.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            port = self._find_pod()
            if port is None:
                return
            with socket.create_connection(("127.0.0.1", port)) as pod:
                back = threading.Thread(target=_pass_on, args=(pod, client), daemon=True)
                back.start()
                _pass_on(client, pod)
                back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass
class Cluster:
    """The pods of an overlay on this machine: each its own process, with ports of its own."""

    manifests: Manifests
    folder: Path
    ports: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(free_port))
    """By pod and the port that it has in its container."""
    pods: dict[str, Pod] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Those that an administrator has made before."""
    _service_ports: dict[int, ServicePort] = field(default_factory=dict)

    def __enter__(self) -> Cluster:
        service = self.manifests.named("Service", "insitu-scheduler")
        for port in service["spec"]["ports"]:
            target = port["targetPort"]
            self._service_ports[port["port"]] = ServicePort(
                lambda target=target: self._ready_scheduler(target)  # type: ignore[misc]
            )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pod in reversed(self.pods.values()):
            if pod.process.poll() is None:
                pod.delete()
        for port in self._service_ports.values():
            port.close()

    @property
    def endpoint(self) -> str:
        """Where clients reach the scheduler's Service."""
        return self._service_ports[7433].address

    def start_all(self) -> None:
        for workload in self.manifests.workloads:
            for ordinal in range(workload["spec"]["replicas"]):
                self.start(workload, ordinal)

    def start(self, workload: dict[str, Any], ordinal: int = 0, **more: str) -> Pod:
        """Starts a pod of a workload, with more in its environment than the manifest says."""
        name = workload["metadata"]["name"] + (f"-{ordinal}" if ordinal else "")
        spec = workload["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        environment = {
            key: self._here(name, value)
            for key, value in self.manifests.environment(container, self.secrets).items()
        } | more
        self._mount_secrets(name, spec, container)
        command = [*container.get("command", entry_point(container["image"]))]
        command += container.get("args", [])
        log_path = self.folder / f"{name}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command[1:]] if command[0] == "python" else command,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
                stdout=log,
                stderr=log,
            )
        ports = {
            at["containerPort"]: self.ports[name, at["containerPort"]]
            for at in container.get("ports", [])
        }
        grace = min(spec["terminationGracePeriodSeconds"], 60)
        self.pods[name] = Pod(name, log_path, container, grace, process, ports)
        return self.pods[name]

    def start_wide_group(self, model: str) -> tuple[Pod, Pod]:
        """Starts a group of two CPU ranks in two pods, as the LeaderWorkerSet's controller does.

        Args:
            model: what it serves, as NAME=PATH.

        Returns:
            The leader and the worker, which may not be ready yet.
        """
        leader, worker = self.manifests.workloads[-2:]
        group = {
            "LWS_GROUP_SIZE": "2",
            "LWS_LEADER_ADDRESS": f"127.0.0.1:{self.ports['leader', 29400]}",
            "INSITU_MODEL": model,
            **ONE_CPU_RANK,
            "INSITU_TP": "2",
        }
        follower = self.start(worker, LWS_WORKER_INDEX="1", **group)
        return self.start(leader, LWS_WORKER_INDEX="0", **group), follower

    def _ready_scheduler(self, target: str) -> int | None:
        """Gives the named port of the scheduler's pod that is ready."""
        for pod in list(self.pods.values()):
            if pod.name.startswith("insitu-scheduler") and pod.is_ready():
                (port,) = (at for at in pod.container["ports"] if at["name"] == target)
                return pod.ports[port["containerPort"]]
        return None

    def _here(self, name: str, value: str) -> str:
        """Says on this machine what a value says in a pod: addresses, ports and folders."""
        service = r"^insitu-scheduler:(\d+)$"
        value = re.sub(service, lambda at: self._service_ports[int(at[1])].address, value)
        value = value.replace("0.0.0.0", "127.0.0.1")
        port = r"^(127\.0\.0\.1:)?(7432|7433|7434|7435|9464)$"
        value = re.sub(port, lambda at: self._port(name, at), value)
        if value.startswith("/etc/"):
            return str(self._root(name) / value[1:])
        return str(self.folder / value[1:]) if value.startswith("/") else value

    def _port(self, name: str, at: re.Match[str]) -> str:
        return f"{at[1] or ''}{self.ports[name, int(at[2])]}"

    def _root(self, name: str) -> Path:
        """The folder of what a pod alone mounts."""
        return self.folder / name

    def _mount_secrets(self, name: str, spec: dict[str, Any], container: dict[str, Any]) -> None:
        for volume, mount in _mounts(spec, container):
            folder = self._root(name) / mount["mountPath"][1:]
            if "secret" in volume:
                folder.mkdir(parents=True, exist_ok=True)
                for key, value in self._secret(volume["secret"]["secretName"]).items():
                    (folder / key).write_bytes(value)

    def _secret(self, name: str) -> dict[str, bytes]:
        if name in self.secrets:
            return {key: value.encode() for key, value in self.secrets[name].items()}
        found = [
            secret for secret in self.manifests.of("Secret") if secret["metadata"]["name"] == name
        ]
        data = found[0]["data"] if found else {}
        return {key: base64.b64decode(value) for key, value in data.items()}


def _mounts(
    spec: dict[str, Any], container: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for mount in container["volumeMounts"]:
        if mount["name"] in volumes:
            yield volumes[mount["name"]], mount

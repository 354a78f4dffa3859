"""Renders the overlays, and runs what their pods would run as processes of this machine."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = sorted(folder.name for folder in (DEPLOY / "k8s/overlays").iterdir())
HAS_KUBECTL = shutil.which("kubectl") is not None


@cache
def render(overlay: str) -> str:
    """Gives an overlay's manifests as `kubectl apply -k` sends them."""
    command = ["kubectl", "kustomize", str(DEPLOY / "k8s/overlays" / overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Manifests:
    """The objects of one overlay."""

    overlay: str

    @cached_property
    def objects(self) -> list[dict[str, Any]]:
        return [found for found in yaml.safe_load_all(render(self.overlay)) if found]

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [found for found in self.objects if found["kind"] in kinds]

    def named(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = [found for found in self.of(kind) if found["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[dict[str, Any]]:
        """What makes pods; a LeaderWorkerSet is two: one for leaders, one for workers."""
        wide = [part for found in self.of("LeaderWorkerSet") for part in _parts(found)]
        return [*self.of("StatefulSet", "Deployment"), *wide]

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """Gives what a container's process has in its environment, as far as it is ours."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            # Secrets are made by whoever deploys.
            if "configMapRef" in source:
                found |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
        for entry in container.get("env", []):
            field_path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            value = "127.0.0.1" if field_path == "status.podIP" else entry.get("value", "")
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda at: found[at[1]], value)
        return found


def _parts(wide: dict[str, Any]) -> Iterator[dict[str, Any]]:
    template = wide["spec"]["leaderWorkerTemplate"]
    for part, number in (("leader", 1), ("worker", template["size"] - 1)):
        labels = template[f"{part}Template"]["metadata"]["labels"]
        yield {
            "metadata": {"name": f"{wide['metadata']['name']}-{part}"},
            "spec": {
                "replicas": wide["spec"]["replicas"] * number,
                "selector": {"matchLabels": labels},
                "template": template[f"{part}Template"],
            },
        }


def entry_point(image: str) -> list[str]:
    """Gives the command of an image's stage in the Dockerfile."""
    stages = re.split(r"^FROM ", (DEPLOY / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    by_name = {re.search(r" AS (\S+)", stage)[1]: stage for stage in stages[1:]}  # type: ignore[index]
    stage = by_name[image.rpartition("/")[2].partition(":")[0]]
    while (found := re.search(r"^ENTRYPOINT (.+)$", stage, flags=re.MULTILINE)) is None:
        stage = by_name[stage.split()[0]]
    command: list[str] = json.loads(found[1])
    return command


@dataclass
class Pod:
    """One container of a pod, as a process."""

    name: str
    log_path: Path
    container: dict[str, Any]
    grace_seconds: int
    process: subprocess.Popen[bytes]
    ports: dict[int, int]

    @property
    def log(self) -> str:
        """What `kubectl logs` shows."""
        return self.log_path.read_text()

    def is_ready(self) -> bool:
        """Asks what the kubelet asks."""
        port = self.ports[self.container["readinessProbe"]["grpc"]["port"]]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_ready(self) -> None:
        probe = self.container["startupProbe"]
        deadline = time.monotonic() + min(300, probe["periodSeconds"] * probe["failureThreshold"])
        while not self.is_ready():
            assert self.process.poll() is None, f"{self.name} ended"
            assert time.monotonic() < deadline, f"{self.name} did not become ready"
            time.sleep(0.1)

    def terminate(self) -> None:
        """Tells it to end, as Kubernetes does after the preStop hook."""
        self.process.terminate()

    def delete(self) -> int:
        """Ends it as Kubernetes does; gives its exit status."""
        self.terminate()
        return self.process.wait(self.grace_seconds)


@dataclass
class Cluster:
    """The pods of an overlay on this machine: each its own process, with ports of its own."""

    manifests: Manifests
    folder: Path
    ports: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(_free_port))
    pods: dict[str, Pod] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Those that an administrator has made before."""

    def __enter__(self) -> Cluster:
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

    @property
    def endpoint(self) -> str:
        """Where clients reach the scheduler's Service."""
        service = self.manifests.named("Service", "insitu-scheduler")
        return f"127.0.0.1:{self.ports['insitu-scheduler', service['spec']['ports'][0]['port']]}"

    def start_all(self) -> None:
        for workload in self.manifests.workloads:
            for _ in range(workload["spec"]["replicas"]):
                self.start(workload)

    def start(self, workload: dict[str, Any], **more: str) -> Pod:
        """Starts a pod of a workload, with more in its environment than the manifest says."""
        name, spec = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        log_path = self.folder / f"{name}.log"
        log = log_path.open("ab")
        environment = {
            key: self._here(name, value)
            for key, value in self.manifests.environment(container).items()
        } | more
        self._mount_secrets(spec, container)
        command = [*container.get("command", entry_point(container["image"]))]
        command += container.get("args", [])
        process = subprocess.Popen(
            [sys.executable, *command[1:]] if command[0] == "python" else command,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdout=log,
            stderr=log,
        )
        log.close()
        ports = {
            at["containerPort"]: self.ports[name, at["containerPort"]]
            for at in container.get("ports", [])
        }
        grace = spec["terminationGracePeriodSeconds"]
        self.pods[name] = Pod(name, log_path, container, min(grace, 60), process, ports)
        return self.pods[name]

    def _here(self, name: str, value: str) -> str:
        """Says on this machine what a value says in a pod: addresses, ports and folders."""
        value = value.replace("insitu-scheduler:7433", self.endpoint)
        value = value.replace("0.0.0.0", "127.0.0.1")
        port = r"^(127\.0\.0\.1:)?(7433|7434|9464)$"
        value = re.sub(port, lambda at: self._port(name, at), value)
        return str(self.folder / value[1:]) if value.startswith("/") else value

    def _port(self, name: str, at: re.Match[str]) -> str:
        return f"{at[1] or ''}{self.ports[name, int(at[2])]}"

    def _mount_secrets(self, spec: dict[str, Any], container: dict[str, Any]) -> None:
        for volume, mount in _mounts(spec, container):
            folder = self.folder / mount["mountPath"][1:]
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""Renders the overlays, and runs what their pods would run as processes of this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

    def environment(
        self, container: dict[str, Any], secrets: Mapping[str, dict[str, str]] | None = None
    ) -> dict[str, str]:
        """Gives what a container's process has in its environment, as far as it is ours.

        Args:
            container: the container.
            secrets: those that whoever deploys has made, by name; what others hold is empty.
        """
        secrets = secrets or {}
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                found |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                found |= secrets.get(source["secretRef"]["name"], {})
        for entry in container.get("env", []):
            value = _value(entry, secrets)
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda at: found[at[1]], value)
        return found


def _value(entry: dict[str, Any], secrets: Mapping[str, dict[str, str]]) -> str:
    match entry:
        case {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}:
            return "127.0.0.1"
        case {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}:
            return secrets.get(name, {}).get(key, "")
    value: str = entry["value"]
    return value


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
        """Asks what the kubelet asks, to know whether the Service has it."""
        return self._answers("readinessProbe")

    def is_alive(self) -> bool:
        """Asks what the kubelet asks, to know whether to kill it."""
        return self._answers("livenessProbe")

    def wait_until_ready(self) -> None:
        self._wait_for("startupProbe")
        self._wait_for("readinessProbe")
        assert self.is_alive()

    def wait_until_started(self) -> None:
        self._wait_for("startupProbe")
        assert self.is_alive()

    def _wait_for(self, probe: str) -> None:
        startup = self.container["startupProbe"]
        seconds = min(300, startup["periodSeconds"] * startup["failureThreshold"])
        deadline = time.monotonic() + seconds
        while not self._answers(probe):
            assert self.process.poll() is None, f"{self.name} ended: {self.log}"
            assert time.monotonic() < deadline, f"{self.name} does not pass its {probe}: {self.log}"
            time.sleep(0.1)

    def _answers(self, probe: str) -> bool:
        asked = self.container[probe]["grpc"]
        with grpc.insecure_channel(f"127.0.0.1:{self.ports[asked['port']]}") as channel:
            request = health_pb2.HealthCheckRequest(service=asked.get("service", ""))
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            except grpc.RpcError:
                return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def terminate(self) -> None:
        """Tells it to end, as Kubernetes does after the preStop hook."""
        self.process.terminate()

    def delete(self) -> int:
        """Ends it as Kubernetes does; gives its exit status."""
        self.terminate()
        return self.process.wait(self.grace_seconds)

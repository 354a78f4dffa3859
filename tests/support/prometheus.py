"""Runs Prometheus on this machine, and asks it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from support.manifests import DEPLOY

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

HAS_PROMETHEUS = bool(shutil.which("prometheus") and shutil.which("promtool"))


def rules() -> dict[str, Any]:
    """Gives the recording and alert rules as Prometheus reads them."""
    found = yaml.safe_load((DEPLOY / "k8s/components/monitoring/rules.yaml").read_text())
    groups: dict[str, Any] = found["spec"]
    return groups


@dataclass
class Prometheus:
    """One that scrapes every second; a context manager."""

    folder: Path
    targets: dict[str, list[str]]
    """Addresses to scrape, by job."""

    def __enter__(self) -> Prometheus:
        (self.folder / "rules.yml").write_text(yaml.safe_dump(rules()))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": addresses}]}
                for job, addresses in self.targets.items()
            ],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        with (self.folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self.folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self.folder / 'tsdb'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait(20)

    def query(self, expression: str) -> list[Any]:
        """Gives an expression's values now."""
        arguments = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{arguments}") as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        found: list[Any] = answer["data"]["result"]
        return found

    def wait_for(self, expression: str, seconds: float = 30) -> list[Any]:
        """Gives an expression's values once there are any."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := self.query(expression):
                    return found
            except OSError:
                pass
            assert time.monotonic() < deadline, f"no data: {expression}"
            time.sleep(0.3)

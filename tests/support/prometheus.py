"""Asks a Prometheus on this machine."""

from __future__ import annotations

import json
import shutil
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

import yaml

from support.manifests import DEPLOY

HAS_PROMETHEUS = bool(shutil.which("prometheus") and shutil.which("promtool"))


def rules() -> dict[str, Any]:
    """Gives the recording and alert rules as Prometheus reads them."""
    found = yaml.safe_load((DEPLOY / "k8s/components/monitoring/rules.yaml").read_text())
    groups: dict[str, Any] = found["spec"]
    return groups


@dataclass(frozen=True)
class Prometheus:
    """One that runs, to ask."""

    url: str

    def query(self, expression: str) -> list[Any]:
        """Gives an expression's values now."""
        arguments = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{arguments}") as response:
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

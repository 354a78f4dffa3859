"""Prometheus for `insitu up --monitoring`: it scrapes what was started, by production's rules.

As `python -m insitu.cli._monitoring` it becomes Prometheus.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from pathlib import Path

_SCRAPE_INTERVAL = "5s"


@dataclass(slots=True)
class Monitoring:
    """What Prometheus is to watch, and where it is."""

    folder: Path
    """Where it keeps what it has scraped."""
    port: int = field(default_factory=lambda: free_port())
    targets: dict[str, list[str]] = field(default_factory=dict)
    """Addresses of metrics, by job."""

    def __post_init__(self) -> None:
        _find_prometheus()

    @property
    def url(self) -> str:
        """Where its own pages are."""
        return f"http://127.0.0.1:{self.port}"

    def add_target(self, job: str) -> int:
        """Chooses a port for the metrics of a process to come, and watches it."""
        port = free_port()
        self.targets.setdefault(job, []).append(f"127.0.0.1:{port}")
        return port

    def arguments(self) -> list[str]:
        """Writes its settings, and gives its arguments."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rules = resources.files("insitu.cli").joinpath("prometheus_rules.yml").read_text()
        (self.folder / "rules.yml").write_text(rules)
        settings = {
            "global": {
                "scrape_interval": _SCRAPE_INTERVAL,
                "evaluation_interval": _SCRAPE_INTERVAL,
            },
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": addresses}]}
                for job, addresses in self.targets.items()
            ],
        }
        # JSON is YAML, too.
        path = self.folder / "prometheus.yml"
        path.write_text(json.dumps(settings, indent=2))
        return [
            f"--config.file={path}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]


def free_port() -> int:
    """Gives a port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _find_prometheus() -> str:
    """Gives the program's path.

    Raises:
        ConfigurationError: it is not installed.
    """
    if (found := shutil.which("prometheus")) is None:
        raise error(
            Reason.INVALID_CONFIGURATION,
            "--monitoring needs Prometheus, and there is no program `prometheus` on the PATH; "
            "install it (`apt-get install prometheus`, `brew install prometheus`), or leave "
            "--monitoring out",
        )
    return found


if __name__ == "__main__":
    os.execv(_find_prometheus(), ["prometheus", *sys.argv[1:]])

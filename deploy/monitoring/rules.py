"""Writes the rules of deploy/k8s for `insitu up --monitoring`, which has no operator to read them.

`python deploy/monitoring/rules.py` writes the file; the tests see that it is current.
"""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "deploy/k8s/components/monitoring/rules.yaml"
FILE = ROOT / "sdk/insitu/cli/prometheus_rules.yml"
_HEAD = (
    "# Written by deploy/monitoring/rules.py, from deploy/k8s/components/monitoring/rules.yaml.\n"
)


def text() -> str:
    """Gives the rules as Prometheus reads them."""
    groups = yaml.safe_load(SOURCE.read_text())["spec"]
    return _HEAD + yaml.safe_dump(groups, sort_keys=False, width=120)


if __name__ == "__main__":
    FILE.write_text(text())

"""What docs/deploy.md and docs/runbook.md tell administrators to do is there to be done."""

from __future__ import annotations

import re
import shlex
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.manifests import DEPLOY, HAS_KUBECTL, OVERLAYS, Manifests

if TYPE_CHECKING:
    from pathlib import Path

_DOCS = DEPLOY.parent / "docs"
_DEPLOY, _RUNBOOK = ((_DOCS / name).read_text() for name in ("deploy.md", "runbook.md"))
_PAGES = _DEPLOY + _RUNBOOK
needs_kubectl = pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl, which renders, is not here")


def test_every_overlay_and_component_is_told_of_and_every_path_is_there() -> None:
    components = [folder.name for folder in (DEPLOY / "k8s/components").iterdir()]
    for name in (*OVERLAYS, *components):
        assert f"`{name}`" in _DEPLOY or f"overlays/{name}`" in _DEPLOY, name
    paths = re.findall(r"\b(?:deploy|examples|docs)/[\w./-]*\w", _PAGES)
    assert paths
    assert [path for path in paths if not (DEPLOY.parent / path).exists()] == []


def test_the_model_of_the_page_is_the_file_that_it_says() -> None:
    (shown,) = re.findall(r"```yaml\n(nameSuffix: .*?)```", _DEPLOY, re.S)
    path = DEPLOY / "k8s/overlays/gpu/llama-70b/kustomization.yaml"
    # Without the comment and the two lines that every such file begins with.
    assert shown == path.read_text().partition("kind: Kustomization\n")[2]


def test_targets_and_build_arguments_are_those_of_the_dockerfile() -> None:
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    targets = set(re.findall(r"--target (\w+)", _PAGES)) | {"demo-shard"}
    assert targets <= set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.M))
    arguments = set(re.findall(r"--build-arg (\w+)", _PAGES))
    assert arguments
    assert arguments <= set(re.findall(r"^ARG (\w+)", dockerfile, re.M))


@needs_kubectl
def test_what_kubectl_is_asked_for_has_the_names_of_the_manifests() -> None:
    objects = [found for overlay in OVERLAYS for found in Manifests(overlay).objects]
    there = {(found["kind"].lower(), found["metadata"]["name"]) for found in objects}
    asked = set(re.findall(r"\b(statefulset|service)/([a-z0-9-]+)", _PAGES))
    assert asked
    assert asked <= there
    (claim,) = re.findall(r"edit pvc ([a-z0-9-]+)", _RUNBOOK)
    scheduler = Manifests("gpu").named("StatefulSet", "insitu-scheduler")
    (template,) = scheduler["spec"]["volumeClaimTemplates"]
    assert claim == f"{template['metadata']['name']}-insitu-scheduler-0"


def test_variables_are_told_to_some_program() -> None:
    told = set(re.findall(r"\bINSITU_[A-Z_0-9]+\b", _PAGES))
    sources = "".join(
        path.read_text()
        for room in ("protos", "scheduler", "shard", "sdk")
        for path in (DEPLOY.parent / room).rglob("*.py")
    )
    assert [name for name in told if f'"{name}"' not in sources] == []


def test_panels_that_the_runbook_names_are_on_a_dashboard() -> None:
    dashboards = "".join(
        path.read_text() for path in (DEPLOY / "k8s/components/monitoring/dashboards").iterdir()
    )
    named = re.findall(r'"([A-Z][^"]+)"', _RUNBOOK)
    assert named
    assert [name for name in named if f'"title": "{name}"' not in dashboards] == []


def test_a_journal_is_copied_by_the_command_of_the_page(tmp_path: Path) -> None:
    (command,) = re.findall(r"exec insitu-scheduler-0 -- (python -c \\\n.*)$", _DEPLOY, re.M)
    _, *arguments = shlex.split(command.replace("\\\n", ""))
    journal = sqlite3.connect(tmp_path / "journal.sqlite")
    journal.execute("PRAGMA journal_mode=WAL")
    journal.execute("CREATE TABLE sessions (id TEXT)")
    journal.execute("INSERT INTO sessions VALUES ('a')")
    journal.commit()
    here = [argument.replace("/data", str(tmp_path)) for argument in arguments]
    subprocess.run([sys.executable, *here], check=True)
    with sqlite3.connect(tmp_path / "copy.sqlite") as copy:
        assert copy.execute("SELECT id FROM sessions").fetchall() == [("a",)]
    journal.close()
    copy.close()

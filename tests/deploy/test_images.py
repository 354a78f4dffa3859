"""The images: what the Dockerfile promises, and what the scheduler's leaves out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from support.manifests import DEPLOY

_DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()
_BUILD = DEPLOY / "docker/build_without_registry.sh"
_TOOLS = ("debootstrap", "buildah", "podman", "runc")
# What a program imports, beside the standard library and itself.
_PROBE = """
import importlib.metadata, json, sys
before = set(sys.modules)
import insitu_{program}.__main__
{more}
owners = importlib.metadata.packages_distributions()
names = {{name.partition(".")[0] for name in sys.modules.keys() - before}}
print(json.dumps([owners[name] for name in sorted(names) if name in owners]))
"""


def _stage(name: str) -> str:
    (found,) = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", _DOCKERFILE, re.M | re.S)
    return str(found)


def test_every_image_is_of_a_pinned_base_and_runs_as_a_user() -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", _DOCKERFILE, re.M)
    assert re.search(r"^ARG TORCH_VERSION=\d+\.\d+\.\d+$", _DOCKERFILE, re.M)
    assert "USER 10001:10001" in _stage("runtime")
    for target in ("scheduler", "shard"):
        assert re.search(rf"^FROM runtime AS {target}$", _DOCKERFILE, re.M)
        # What compiles and downloads stays behind: one copy from the build, and no RUN.
        assert "COPY --from=build-" in _stage(target)
        assert "RUN" not in _stage(target)


@pytest.mark.parametrize("program", ["scheduler", "shard"])
def test_all_that_an_image_asks_for_is_pinned_to_a_version_that_will_do(program: str) -> None:
    lines = (DEPLOY / "docker/constraints.txt").read_text().splitlines()[1:]
    pins = dict(line.split("==") for line in lines)
    assert "--constraint deploy/docker/constraints.txt" in _stage(f"build-{program}")
    for requirement in _asked_for(program):
        if requirement.name == "torch":
            pins["torch"] = re.search(r"^ARG TORCH_VERSION=(\S+)$", _DOCKERFILE, re.M)[1]  # type: ignore[index]
        pin = pins[_plain(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement}: run constraints.py"


@pytest.mark.parametrize(
    ("program", "more"), [("scheduler", "import insitu_scheduler.server"), ("shard", "")]
)
def test_what_a_program_imports_is_in_its_image(program: str, more: str) -> None:
    probe = _PROBE.format(program=program, more=more)
    command = [sys.executable, "-c", probe]
    imported = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert ["grpcio"] in imported
    # grpc imports its tools where they are, and does without.
    there = _installed(program) | {"insitu", "grpcio-tools"}
    # Some names are shared: google is of protobuf, and of others.
    assert [names for names in imported if there.isdisjoint(map(_plain, names))] == []


def test_the_image_of_the_scheduler_has_nothing_that_runs_models() -> None:
    assert _installed("scheduler").isdisjoint({"torch", "transformers", "accelerate"})
    assert {"torch", "transformers", "safetensors"} <= _installed("shard")


def _installed(program: str) -> set[str]:
    """Gives what is installed into an image: what is asked for, and all that this needs."""
    found: set[str] = set()
    waiting = _asked_for(program)
    while waiting:
        requirement = waiting.pop()
        name = _plain(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            waiting += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _asked_for(program: str) -> list[Requirement]:
    script = DEPLOY / "docker/requirements.py"
    command = [sys.executable, str(script), program]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=DEPLOY.parent
    ).stdout
    return [Requirement(line) for line in printed.splitlines()]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(
    not os.environ.get("INSITU_IMAGES"), reason="takes minutes: INSITU_IMAGES=1 builds them"
)
@pytest.mark.timeout(1800)
def test_the_image_of_the_scheduler_builds_and_serves() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    assert not missing, f"install {missing}"
    done = subprocess.run([_BUILD, "scheduler"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the scheduler of the image serves" in done.stdout

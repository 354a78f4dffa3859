"""Writes constraints.txt: the versions of all that images install, as they are installed here.

`python deploy/docker/constraints.py`, in the environment that the tests have passed in.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from requirements import requirements

FILE = Path(__file__).with_name("constraints.txt")
_HEAD = "# Written by deploy/docker/constraints.py.\n"
_PROGRAMS = ("scheduler", "shard", "local")
# The Dockerfile says which torch, and torch says which parts of CUDA.
_APART = {"torch", "triton"}
_PARTS_OF_CUDA = ("cuda-", "nvidia-")


def text() -> str:
    """Gives the file, from what is installed."""
    found: dict[str, str] = {}
    waiting = [Requirement(line) for program in _PROGRAMS for line in requirements(program)]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        if requirement.name == "insitu" or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        extras = ["", *requirement.extras]
        waiting += [
            more
            for more in map(Requirement, distribution.requires or [])
            if more.marker is None or any(more.marker.evaluate({"extra": at}) for at in extras)
        ]
    pinned = (name for name in found if not name.startswith(_PARTS_OF_CUDA))
    lines = [f"{name}=={found[name]}\n" for name in sorted(set(pinned) - _APART)]
    return "".join([_HEAD, *lines])


if __name__ == "__main__":
    FILE.write_text(text())

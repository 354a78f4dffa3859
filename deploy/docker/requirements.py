"""Prints what a program needs, out of pyproject.toml: `requirements.py scheduler|shard`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# What runs models; the scheduler never imports it.
_MODEL_PACKAGES = {"accelerate", "safetensors", "torch", "transformers"}
# What images have beside what their program needs.
_EXTRAS = {"scheduler": ["postgres", "s3"]}


def requirements(program: str) -> list[str]:
    """Gives the requirements of a program."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [program, *_EXTRAS.get(program, [])]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    left_out = _MODEL_PACKAGES if program == "scheduler" else set()
    return [line for line in wanted if re.split(r"[<>=\[ ]", line)[0] not in left_out]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))  # noqa: T201

"""What of transformers may change without notice is named in one module, for known versions."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from insitu_shard.engine import transformers_internals

SHARD = Path(transformers_internals.__file__).parents[1]
_INTERNAL = re.compile(r"^\s*from transformers\.(?!utils\b)", re.MULTILINE)


def test_only_one_module_reaches_into_transformers() -> None:
    reaching = {path.name for path in SHARD.rglob("*.py") if _INTERNAL.search(path.read_text())}
    assert reaching == {"transformers_internals.py"}


def test_the_contract_tests_are_run_on_the_lowest_and_the_newest_of_them() -> None:
    root = Path(__file__).parents[2]
    (listed,) = re.findall(r"^TRANSFORMERS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    tested = transformers_internals.TESTED_VERSIONS
    assert listed.split() == sorted({tested[0], tested[-1]})
    assert f'"transformers>={tested[0]},<6"' in (root / "pyproject.toml").read_text()


def test_the_installed_version_is_one_that_was_tested() -> None:
    assert transformers.__version__ in transformers_internals.TESTED_VERSIONS

"""Runs the examples of the pages in docs/, to compare what they raise with what is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import insitu
from insitu import Error

ERROR_PAGES = Path(__file__).resolve().parents[2] / "docs" / "errors"
GUIDES = [
    *sorted((ERROR_PAGES.parent / "usage").glob("*.md")),
    ERROR_PAGES.parent / "coming-from-nnsight.md",
]
_FENCE = re.compile(r"^```(?P<kind>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A block of Python, and the error that the page says it raises; "" for none."""

    code: str
    shown: str
    needs_server: bool


def examples(page: Path) -> list[Example]:
    """Gives the examples of a page: ```python blocks, each with the ```text block after it."""
    blocks = [(match["kind"], match["text"]) for match in _FENCE.finditer(page.read_text())]
    found = []
    following = [*blocks, ("", "")][1:]
    for (kind, code), (next_kind, text) in zip(blocks, following, strict=True):
        if kind in ("python", "python server"):
            shown = text if next_kind == "text" else ""
            found.append(Example(code, shown, needs_server=kind == "python server"))
    return found


def namespace(model: insitu.LanguageModel) -> dict[str, Any]:
    """Gives the names that docs/errors/README.md says the examples have."""
    return {
        "CONFIG": insitu.CONFIG,
        "LanguageModel": insitu.LanguageModel,
        "insitu": insitu,
        "model": model,
        "torch": torch,
    }


def raised_by(example: Example, names: dict[str, Any], folder: Path) -> Error | None:
    """Runs an example as the file example.py and gives the error of insitu that it raises."""
    folder.mkdir()
    file = folder / "example.py"
    file.write_text(example.code)
    try:
        exec(compile(example.code, str(file), "exec"), names)
    except Error as err:
        return err
    return None


def as_shown(err: Error, folder: Path) -> str:
    """Gives an error as the pages show it."""
    return f"{type(err).__name__}: {err}".replace(f"{folder}/", "")


def agrees(shown: str, actual: str) -> bool:
    """Tells whether a page shows what came: "..." stands for anything, line breaks for spaces."""
    pattern = re.escape(" ".join(shown.split())).replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, " ".join(actual.split())) is not None


def run_page(page: Path, model: insitu.LanguageModel, folder: Path, *, with_server: bool) -> None:
    """Runs the examples of a page in one namespace, top to bottom."""
    names = namespace(model)
    for number, example in enumerate(examples(page)):
        if with_server or not example.needs_server:
            file = folder / f"{page.stem}-{number}.py"
            file.write_text(example.code)
            exec(compile(example.code, str(file), "exec"), names)

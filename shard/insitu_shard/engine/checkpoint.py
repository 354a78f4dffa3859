"""Finds out from the files of a checkpoint, without reading weights, whether it can be loaded."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from pathlib import Path


def check_checkpoint(folder: Path) -> None:
    """Checks that every file of a checkpoint is there, whole, and holds what the index says.

    Raises:
        ConfigurationError: a file is missing or damaged.
    """
    for file, names in _expected_tensors(folder).items():
        if missing := names - _stored_tensors(folder / file):
            raise _unusable(
                folder / file,
                f"lacks {len(missing)} of the tensors that {SAFE_WEIGHTS_INDEX_NAME} places in it, "
                f"such as {min(missing)}; download both again",
            )


def _expected_tensors(folder: Path) -> dict[str, set[str]]:
    """Gives the files of a checkpoint, each with the tensors that its index places there."""
    # The order is transformers' own.
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return {SAFE_WEIGHTS_NAME: set()}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise _unusable(
            folder,
            f"has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; give a folder with "
            "weights as safetensors, which `save_pretrained` of transformers writes",
        )
    expected: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        expected.setdefault(file, set()).add(name)
    if missing := sorted(file for file in expected if not (folder / file).is_file()):
        raise _unusable(
            folder,
            f"lacks {len(missing)} of the {len(expected)} files that {SAFE_WEIGHTS_INDEX_NAME} "
            f"names: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}; download the model "
            "again",
        )
    return expected


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text())
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exception:
        raise _unusable(index, "is no index of a checkpoint; download it again") from exception


def _stored_tensors(file: Path) -> set[str]:
    if not os.access(file, os.R_OK):
        raise _unusable(
            file,
            f"may not be read by user {os.getuid()}, who this process runs as; let that user read "
            "it, with chmod",
        )
    try:
        # This reads the header, and compares it with the file's size.
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (OSError, SafetensorError) as exception:
        raise _unusable(
            file,
            f"is damaged or cut short, {file.stat().st_size} bytes ({exception}); download it "
            "again",
        ) from exception


def _unusable(path: Path, why: str) -> Error:
    return error(Reason.INVALID_CONFIGURATION, f"{path} {why}", path=path)

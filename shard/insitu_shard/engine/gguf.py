"""Converts models from GGUF, the format of llama.cpp, to safetensors."""

from __future__ import annotations

import hashlib
import logging
import shutil
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME

from insitu_shard.engine.pretrained import from_pretrained
from insitu_shard.engine.progress import progress_shown
from insitu_wire.errors import Reason, error, one_line
from insitu_wire.made_once import made_once
from insitu_wire.paths import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)


def find_gguf(path: Path) -> Path | None:
    """Gives the GGUF file that a path names: the file itself, or the only one of a folder.

    Raises:
        ConfigurationError: the folder has several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) > 1:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{path} has {len(files)} GGUF files; give the path of one: "
            f"{', '.join(file.name for file in files)}",
            path=path,
        )
    return files[0] if files else None


def converted(file: Path) -> Path:
    """Gives the folder with a GGUF file's model as safetensors; converts it at the first time.

    Raises:
        ConfigurationError: transformers can not read it.
    """
    file = file.resolve()
    stat = file.stat()
    # Another file in its place is another model.
    key = hashlib.sha256(f"{file}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "converted" / f"{file.stem}-{key}"
    return made_once(folder, lambda made: convert(file, made))


def convert(file: Path, folder: Path) -> None:
    """Writes the weights of a GGUF file, dequantised, and its tokenizer.

    Weights that are quantised become float32, which holds every value exactly.

    Raises:
        ConfigurationError: transformers can not read it.
    """
    _log.info("converting %s to safetensors, once", file)
    try:
        _write_model(file, folder)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as exception:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{file} needs the package gguf: pip install gguf",
            path=file,
        ) from exception
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as exception:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{file} is no GGUF file of a model that transformers reads ({one_line(exception)}); "
            "give the model as safetensors",
            path=file,
        ) from exception
    tokenizer.save_pretrained(folder)


def _write_model(file: Path, folder: Path) -> None:
    # Its types do not know what transformers puts there.
    with progress_shown(file.name):
        model: Any = from_pretrained(file.parent, gguf_file=file.name, dtype=_stored_dtype(file))
    # transformers takes the weights for quantised still, and would refuse to write them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    # safetensors writes files that their owner alone can read; a server may be another user.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG_NAME, weights)


def _stored_dtype(file: Path) -> torch.dtype:
    """Gives the element type in which no weight of a file loses anything."""
    from gguf import GGMLQuantizationType, GGUFReader

    types = {at.tensor_type for at in GGUFReader(file).tensors if len(at.shape) > 1}
    half = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return half.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32

"""Finds a model's folder, and what lies in it beside the weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers import __version__ as version

from insitu_shard.engine.gguf import converted, find_gguf
from insitu_wire.errors import Error, Reason, error, one_line
from insitu_wire.paths import model_cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|.*\.model"
)


def resolve_model_folder(name: str) -> Path:
    """Finds a model's folder: a path, insitu's own cache, or the Hugging Face hub and its cache.

    A GGUF file, or a folder that has one, is converted once, and stands for what that gives.

    Raises:
        ConfigurationError: there is such a folder, but no model in it.
        NotFoundError: it is in none of them.
    """
    path = Path(name).expanduser()
    for folder in (path, model_cache_folder(name)):
        if (folder / "config.json").is_file():
            return folder
    if gguf := find_gguf(path):
        return converted(gguf)
    if path.is_dir():
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{path} has no config.json and no GGUF file; give the folder of a model as "
            "transformers writes it, or a GGUF file",
            folder=path,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as exception:
        raise error(
            Reason.MODEL_NOT_FOUND,
            f"there is no model {name!r}: no folder of this path with a config.json, none at "
            f"{model_cache_folder(name)}, and the Hugging Face hub does not give it "
            f"({type(exception).__name__}); give the path of a folder, or run `insitu demo-model`",
            model=name,
        ) from exception


def load_config(folder: Path) -> PretrainedConfig:
    """Reads a model's configuration.

    Raises:
        ConfigurationError: the folder holds none that transformers knows, or not of a language
            model.
    """
    model_type = _model_type(folder / "config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as exception:
        raise _no_model(
            folder, f"is not as transformers has it: {one_line(exception)}"
        ) from exception
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_model(
            folder,
            f"is of a {model_type} model, which does not predict tokens; give a language model",
        )
    return config


def _model_type(file: Path) -> str:
    """Reads which architecture a configuration is of."""
    try:
        values: Any = json.loads(file.read_text())
        model_type = values.get("model_type")
    except (OSError, ValueError, AttributeError) as exception:
        raise _no_model(file.parent, f"can not be read ({one_line(exception)})") from exception
    if model_type not in CONFIG_MAPPING:
        raise _no_model(
            file.parent,
            f"has model_type {model_type!r}, an architecture that transformers {version} does not "
            "know; give a model of one that it knows, or install a newer transformers",
        )
    return str(model_type)


def _no_model(folder: Path, why: str) -> Error:
    return error(Reason.INVALID_CONFIGURATION, f"{folder / 'config.json'} {why}", folder=folder)


def tokenizer_files(folder: Path) -> list[Path]:
    """Gives the files in a model's folder that make its tokenizer, by name."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILE.fullmatch(path.name))


def tokenizer_hash(files: list[Path]) -> str:
    """Gives the SHA-256 over the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

"""Finds a model's folder, and what lies in it beside the weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from insitu_wire.errors import Reason, error
from insitu_wire.paths import model_cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|.*\.model"
)


def resolve_model_folder(name: str) -> Path:
    """Finds a model's folder: a path, insitu's own cache, or the Hugging Face hub and its cache.

    Raises:
        NotFoundError: it is in none of them.
    """
    for folder in (Path(name).expanduser(), model_cache_folder(name)):
        if (folder / "config.json").is_file():
            return folder
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
        ConfigurationError: the folder holds none that transformers knows.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config
    except (OSError, ValueError) as exception:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{folder} holds no model that transformers can load: {exception}",
            folder=folder,
        ) from exception


def tokenizer_files(folder: Path) -> list[Path]:
    """Gives the files in a model's folder that make its tokenizer, by name."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILE.fullmatch(path.name))


def tokenizer_hash(files: list[Path]) -> str:
    """Gives the SHA-256 over the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

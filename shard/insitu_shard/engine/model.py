"""Loads a model from safetensors, whole or as this rank's slices."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from insitu_proto.v1 import model_pb2
from insitu_shard.compiler import Outline
from insitu_shard.engine.boundary_value import check_token_ids
from insitu_shard.engine.describe import describe, measure_fake
from insitu_shard.engine.inputs import Batch, ForwardInputs, model_inputs, rows_of
from insitu_shard.engine.layout import Layouts, find_layouts
from insitu_shard.engine.measure import PROBE_SIZES, block_paths, measure
from insitu_shard.engine.module import LoadedModule
from insitu_shard.engine.ranks import Ranks
from insitu_wire.errors import Reason, error
from insitu_wire.paths import model_cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    from insitu_shard.engine.graph import Invoke
    from insitu_shard.engine.inputs import Rows


_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|.*\.model"
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel(LoadedModule):
    """A model in this process's memory, ready to run, whole or one rank's slices of it."""

    folder: Path
    config: PretrainedConfig
    module: PreTrainedModel
    dtype: torch.dtype

    @cached_property
    def block_paths(self) -> frozenset[str]:
        """Paths of the decoder layers."""
        return block_paths(self.module)

    @cached_property
    def embedding_path(self) -> str | None:
        """Path of the module that embeds token ids."""
        embedding = self.module.get_input_embeddings()
        paths = (path for path, module in self.modules.items() if module is embedding)
        return next(paths, None)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @property
    def writes_in_place(self) -> bool:
        """Whether its forward pass may write into what a module has taken or returned."""
        # transformers' models do not.
        return False

    def batch(self, invokes: Sequence[Invoke]) -> Batch:
        """Puts the rows of all invokes into one batch."""
        return Batch.of([rows_of(at, at.token_ids, self.vocab_size) for at in invokes])

    def forward_inputs(self, invokes: Sequence[Invoke]) -> ForwardInputs:
        """Gives the token ids of all invokes as one batch."""
        return self.inputs_of_rows(self.batch(invokes).rows)

    def inputs_of_rows(self, rows: Rows) -> ForwardInputs:
        """Gives what the forward pass over rows of token ids is called with."""
        inputs = model_inputs(rows, pad_token_id=self.pad_token_id, device=self.device)
        return ForwardInputs((), {**inputs, "use_cache": False})

    @cached_property
    def outline(self) -> Outline:
        """Where its modules are in a forward pass; without blocks if rows can not fork."""
        outline = Outline.of(self.describe())
        if any(self.layouts.at(path, is_input=False).is_sharded for path in outline.blocks):
            return Outline(modules=outline.modules)
        return outline

    def check_arguments(self, path: str, arguments: tuple[Any, Any]) -> None:
        """Refuses token ids that the embedding has no row for."""
        if path == self.embedding_path:
            check_token_ids(arguments, self.vocab_size, f"{path}.input")

    def structure(self, path: str, *, is_input: bool) -> model_pb2.StructureSpec:
        """Gives what is known of the tensors at a module boundary of the whole model.

        For inputs, a pair of the positional and the keyword arguments.
        """
        module = self._described_modules[path]
        if not is_input:
            return module.output
        pair = model_pb2.StructureList(items=[module.args, module.kwargs])
        return model_pb2.StructureSpec(tuple=pair)

    @cached_property
    def _described_modules(self) -> dict[str, model_pb2.Module]:
        return {module.path: module for module in self.describe().modules}

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """The files that make the tokenizer."""
        return tokenizer_files(self.folder)

    def describe(self) -> model_pb2.ModelDescription:
        """Describes the whole model, however it is split."""
        return describe(
            self.config,
            name=self.name,
            dtype=self.dtype,
            tokenizer_hash=tokenizer_hash(self.tokenizer_files),
        )

    @property
    def pad_token_id(self) -> int:
        """Id that fills padded positions; which one does not matter, for they are masked."""
        pad = getattr(self.config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0


def load_model(
    name: str,
    folder: Path,
    *,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Loads a model.

    Args:
        name: name by which sessions ask for it.
        folder: folder of its config.json and safetensors files.
        ranks: this process's place in its group; every rank must call.
        device: where to put it; by default the CPU.
        dtype: element type of the weights; by default as stored.

    Raises:
        ConfigurationError: the folder holds no model, or the model can not be split so.
    """
    ranks = ranks or Ranks()
    device = device or torch.device("cpu")
    config = load_config(folder)
    check_ranks(config, ranks.size)
    options = (
        {"distributed_config": DistributedConfig(tp_size=ranks.size)} if ranks.size > 1 else {}
    )
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, **options
    )
    module = module.eval().requires_grad_(False)
    if ranks.size == 1:
        module = module.to(device)
    layouts = _layouts(config, module, ranks, device)
    return LoadedModel(
        name=name,
        folder=folder,
        config=config,
        module=module,
        device=device,
        dtype=module.dtype,
        layouts=layouts,
        ranks=ranks,
    )


def _layouts(
    config: PretrainedConfig, module: torch.nn.Module, ranks: Ranks, device: torch.device
) -> Layouts:
    if ranks.size == 1:
        return Layouts()
    _, (full, *_) = measure_fake(config, dtype=torch.float32)
    return find_layouts(full, measure(module, PROBE_SIZES[0], device), ranks)


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


def check_ranks(config: PretrainedConfig, num_ranks: int) -> None:
    """Refuses a number of ranks that would only fail in the first forward pass.

    Raises:
        ConfigurationError: the model can not be split so; the message names what is possible.
    """
    if num_ranks == 1:
        return
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    possible = [n for n in range(1, heads + 1) if heads % n == 0 and kv_heads % n == 0]
    if num_ranks not in possible:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"a model of {heads} attention heads and {kv_heads} key-value heads can not be split "
            f"over {num_ranks} ranks; use one of {', '.join(map(str, possible))}",
            numRanks=num_ranks,
            numHeads=heads,
            numKeyValueHeads=kv_heads,
        )
    if not getattr(config, "base_model_tp_plan", None):
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"transformers has no tensor-parallel plan for a {config.model_type} model; use 1 rank",
            modelType=config.model_type,
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


def tokenizer_files(folder: Path) -> list[Path]:
    """Gives the files in a model's folder that make its tokenizer, by name."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILE.fullmatch(path.name))


def tokenizer_hash(files: list[Path]) -> str:
    """Gives the SHA-256 over the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

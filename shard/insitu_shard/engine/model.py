"""A language model as the engine runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, StoppingCriteriaList, StopStringCriteria

from insitu_proto.v1 import model_pb2
from insitu_shard.compiler import Outline
from insitu_shard.engine.boundary_value import check_token_ids
from insitu_shard.engine.choosing import Chooser
from insitu_shard.engine.describe import describe
from insitu_shard.engine.graph import Generation
from insitu_shard.engine.inputs import (
    Batch,
    ForwardInputs,
    generation_inputs,
    model_inputs,
    rows_of,
    state_bytes,
)
from insitu_shard.engine.measure import block_paths
from insitu_shard.engine.model_folder import tokenizer_files, tokenizer_hash
from insitu_shard.engine.module import LoadedModule
from insitu_shard.engine.transformers_internals import DecodeState, prepare_generation
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from insitu_shard.engine.graph import Invoke
    from insitu_shard.engine.inputs import Rows
    from insitu_shard.engine.transformers_internals import PreparedGeneration

_WARM_UP_TOKENS = 8


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

    def chooser(self, batch: Batch, generation: Generation, seed: int) -> Chooser:
        """Makes what chooses a trace's tokens.

        Args:
            batch: its rows.
            generation: how it generates.
            seed: of its random numbers.

        Raises:
            Error: MALFORMED_SESSION for options that transformers refuses.
        """
        prepared = self._prepared(batch.rows, generation)
        return Chooser(prepared, seed, generation.max_new_tokens)

    def decode_state(self, batches: Sequence[Batch]) -> DecodeState:
        """Makes what the model keeps of the rows of traces that generate together."""
        rows = tuple(row for batch in batches for row in batch.rows)
        return DecodeState(self.module, self._prepared(rows, Generation(max_new_tokens=1)))

    def _prepared(self, rows: Rows, generation: Generation) -> PreparedGeneration:
        inputs = generation_inputs(rows, pad_token_id=self.pad_token_id, device=self.device)
        options: dict[str, Any] = dict(generation.options)
        if stop_strings := options.pop("stop_strings", None):
            criterion = StopStringCriteria(self.tokenizer, stop_strings)
            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        try:
            return prepare_generation(
                self.module, inputs, max_new_tokens=generation.max_new_tokens, **options
            )
        except (ValueError, TypeError) as exception:
            raise error(
                Reason.MALFORMED_SESSION, f"transformers refuses to generate so: {exception}"
            ) from exception

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True
        )
        return tokenizer

    @cached_property
    def state_bytes(self) -> int:
        """Estimate of the bytes that stay of each token while a trace generates."""
        return state_bytes(self.config, self.dtype.itemsize)

    def warm_up(self) -> None:
        """Runs one forward pass, so that what the first one takes longer is done."""
        inputs = self.inputs_of_rows(((0,) * _WARM_UP_TOKENS,))
        with torch.no_grad():
            self.module(*inputs.args, **inputs.kwargs)

    @cached_property
    def outline(self) -> Outline:
        """Where its modules are in a forward pass; without blocks if rows can not fork."""
        outline = Outline.of(self.describe())
        if any(self.layouts.at(path, is_input=False).is_sharded for path in outline.blocks):
            return Outline(modules=outline.modules)
        # Only that attention is known to `packing.py`.
        is_known = self.module.config._attn_implementation == "sdpa"
        return replace(outline, shares_prefixes=outline.shares_prefixes and is_known)

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

"""All of transformers that is not its public interface, named once: what an upgrade may break.

What stands here is checked by `tests/contract/test_transformers_versions.py`, which also names the
versions that insitu was run against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.distributed import tensor_parallel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import TensorParallelLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        StoppingCriteriaList,
    )

TESTED_VERSIONS = ("5.24.0",)
"""Versions that the tests were run against."""

# Its types say that styles are functions.
_STYLES: Any = tensor_parallel.ALL_PARALLEL_STYLES  # type: ignore[attr-defined]


def register_style(name: str, style: TensorParallelLayer) -> None:
    """Makes a way to split a module known to transformers' plans."""
    _STYLES.register(name, style)


@dataclass(slots=True)
class PreparedGeneration:
    """What `generate` has made of inputs and options, just before its loop begins."""

    token_ids: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    """Arguments of the forward pass, such as the cache."""

    @property
    def pad_token_id(self) -> int | None:
        """What rows that have ended are filled with."""
        pad = self.config._pad_token_tensor
        return None if pad is None else int(pad)


def prepare_generation(
    module: PreTrainedModel, inputs: Mapping[str, torch.Tensor], **options: Any
) -> PreparedGeneration:
    """Has transformers' own `generate` do all that it does before its loop.

    Args:
        module: the model.
        inputs: token ids and their mask.
        options: as `generate` takes them.
    """

    def prepared(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> PreparedGeneration:
        del model
        return PreparedGeneration(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )

    # Its types are those of the loop's results.
    generate: Any = module.generate
    result: PreparedGeneration = generate(**inputs, custom_generate=prepared, **options)
    return result


class DecodeState:
    """What the model keeps of rows from step to step: their ids, their masks, and the cache."""

    def __init__(self, module: PreTrainedModel, prepared: PreparedGeneration) -> None:
        """Begins before the first step."""
        self._module: Any = module
        self._token_ids = prepared.token_ids
        self._kwargs = prepared.model_kwargs

    def inputs(self, *, is_first: bool, has_all_logits: bool) -> dict[str, Any]:
        """Gives the arguments of the next forward pass.

        Args:
            is_first: whether it is that of the prompts.
            has_all_logits: whether logits of all positions are needed, and not the last one's only.
        """
        kwargs = self._kwargs
        if has_all_logits and "logits_to_keep" in kwargs:
            kwargs = {**kwargs, "logits_to_keep": 0}
        length = None if is_first or not kwargs["use_cache"] else 1
        inputs: dict[str, Any] = self._module.prepare_inputs_for_generation(
            self._token_ids, next_sequence_length=length, is_first_iteration=is_first, **kwargs
        )
        return {**inputs, "return_dict": True}

    def took(self, outputs: Any, tokens: torch.Tensor) -> None:
        """Takes in what a pass gave, and the tokens that were chosen from it, one a row."""
        self._kwargs = self._module._update_model_kwargs_for_generation(outputs, self._kwargs)
        self._token_ids = torch.cat([self._token_ids, tokens[:, None]], dim=-1)

    @property
    def can_grow(self) -> bool:
        """Whether rows can be added: known layers of a cache hold nothing but keys and values."""
        cache = self._kwargs.get("cache")
        return cache is not None and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        )

    def grow(self, other: DecodeState) -> None:
        """Goes on with the rows of another, too, which is as many positions long."""
        num_rows = len(self._token_ids)
        self._token_ids = torch.cat([self._token_ids, other._token_ids])
        for name, value in self._kwargs.items():
            # Of one dimension are positions, which all rows have alike.
            if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == num_rows:
                self._kwargs[name] = torch.cat([value, other._kwargs[name]])
        layers = zip(self._kwargs["cache"].layers, other._kwargs["cache"].layers, strict=True)
        for layer, others in layers:
            if layer.is_initialized:
                layer.keys = torch.cat([layer.keys, others.keys])
                layer.values = torch.cat([layer.values, others.values])

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with some of the rows."""
        num_rows = len(self._token_ids)
        self._token_ids = self._token_ids[rows]
        for name, value in self._kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_rows:
                self._kwargs[name] = value[rows]
        if (cache := self._kwargs.get("cache")) is not None:
            cache.reorder_cache(rows)


__all__ = [
    "TESTED_VERSIONS",
    "Conv1D",
    "DecodeState",
    "DistributedConfig",
    "GradientCheckpointingLayer",
    "PreparedGeneration",
    "TensorParallelLayer",
    "prepare_generation",
    "register_style",
    "sdpa_attention_forward",
    "sdpa_mask",
]

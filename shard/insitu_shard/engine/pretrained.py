"""transformers' own loading, made to fail where it would make weights up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from insitu_shard.engine.slices import lazy_state_dict
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def from_pretrained(
    folder: Path, *, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """Loads a causal language model, frozen.

    Args:
        folder: folder of its files.
        dtype: element type of the weights; by default as stored.
        options: as transformers' `from_pretrained` takes them.

    Raises:
        ConfigurationError: the files lack weights of the model.
    """
    # Its types do not know that it returns a pair.
    loader: Any = AutoModelForCausalLM
    module, report = loader.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True, **options
    )
    return _whole(module, report, folder)


def from_slices(
    config: PretrainedConfig, folder: Path, *, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """Loads this rank's slices of a causal language model, frozen.

    Args:
        config: the model's.
        folder: folder of its safetensors files.
        dtype: element type of the weights; by default as stored.
        options: as transformers' `from_pretrained` takes them.

    Raises:
        ConfigurationError: the files lack weights of the model.
    """
    loader: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with lazy_state_dict(folder) as tensors:
        module, report = loader.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype or "auto",
            output_loading_info=True,
            **options,
        )
    return _whole(module, report, folder)


def _whole(module: Any, report: dict[str, set[Any]], folder: Path) -> PreTrainedModel:
    """Checks that no weight is missing: transformers puts random numbers in their place."""
    if absent := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{folder} lacks {len(absent)} weights of a {type(module).__name__}, or has them in "
            f"another shape, such as {absent[0]}; its config.json is of another model than its "
            "weights, or they were not saved whole",
            folder=folder,
        )
    loaded: PreTrainedModel = module.eval().requires_grad_(False)
    return loaded

"""transformers' own loading, made to fail where it would make weights up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


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
    # transformers would put random numbers in their place.
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

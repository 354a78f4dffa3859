"""All of transformers that is not its public interface, named once: what an upgrade may break.

What stands here is checked by `tests/contract/test_transformers_versions.py`, which also names the
versions that insitu was run against.
"""

from __future__ import annotations

from typing import Any

from transformers.distributed import tensor_parallel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import TensorParallelLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

TESTED_VERSIONS = ("5.23.0",)
"""Versions that the tests were run against."""

# Its types say that styles are functions.
_STYLES: Any = tensor_parallel.ALL_PARALLEL_STYLES  # type: ignore[attr-defined]


def register_style(name: str, style: TensorParallelLayer) -> None:
    """Makes a way to split a module known to transformers' plans."""
    _STYLES.register(name, style)


__all__ = [
    "TESTED_VERSIONS",
    "Conv1D",
    "DistributedConfig",
    "GradientCheckpointingLayer",
    "TensorParallelLayer",
    "register_style",
    "sdpa_attention_forward",
    "sdpa_mask",
]

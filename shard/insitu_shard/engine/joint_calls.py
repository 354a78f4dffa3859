"""Makes one call of a module of many, where its rows do not know of each other.

A head that is applied to one position of every layer reads its weights thirty times, and once if it
is applied to all of them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_shard.engine.transformers_internals import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_MAX_BYTES = 64 * 1024**2


def is_row_wise(module: torch.nn.Module) -> bool:
    """Whether a module does the same to each vector of the last dimension."""
    name = type(module).__name__
    is_norm = name.endswith("Norm") and "Batch" not in name and "Group" not in name
    return not list(module.children()) and (
        isinstance(module, torch.nn.Linear | Conv1D | torch.nn.LayerNorm) or is_norm
    )


def call_jointly(
    module: torch.nn.Module, call: Callable[[torch.Tensor], object], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor] | None:
    """Applies a row-wise module to several tensors.

    Args:
        module: the module.
        call: calls it.
        inputs: what to apply it to, [..., features].

    Returns:
        What it gives for each, as views of one memory; None if they do not fit together.
    """
    first = inputs[0]
    if any(
        not isinstance(tensor, torch.Tensor)
        or not tensor.ndim
        or (tensor.shape[-1], tensor.dtype, tensor.device)
        != (first.shape[-1], first.dtype, first.device)
        for tensor in inputs
    ):
        return None
    results: list[torch.Tensor] = []
    width = getattr(module, "out_features", None) or getattr(module, "nf", None) or first.shape[-1]
    for chunk in _chunks(inputs, width * first.element_size()):
        rows = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in chunk])
        result = call(rows)
        if not isinstance(result, torch.Tensor) or result.shape[:-1] != rows.shape[:-1]:
            return None
        sizes = [tensor.numel() // tensor.shape[-1] for tensor in chunk]
        parts = zip(result.split(sizes), chunk, strict=True)
        results += [part.view(*tensor.shape[:-1], -1) for part, tensor in parts]
    return results


def _chunks(inputs: Sequence[torch.Tensor], row_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Cuts tensors into lists whose results are not too large together."""
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in inputs:
        more = tensor.numel() // tensor.shape[-1] * row_bytes
        if chunk and size + more > _MAX_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += more
    yield chunk

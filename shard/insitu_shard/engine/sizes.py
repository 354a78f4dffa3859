"""Refuses operations whose results would take too much memory, before they take any."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.operations import function
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MAX_TENSOR_BYTES
from insitu_wire.operations import FACTORIES, last_word

# These grow with a number among their arguments.
_GROWING = {
    "cartesian_prod", "combinations", "expand", "expand_as", "broadcast_to", "interpolate", "kron",
    "linspace", "logspace", "arange", "new_empty", "new_full", "new_ones", "new_zeros", "one_hot",
    "pad", "repeat", "repeat_interleave", "tile", "tril_indices", "triu_indices", "vander",
    "bincount", "diag", "diag_embed", "diagflat", "block_diag", "full_like", "scalar_tensor",
    "histc", "fft", "ifft", "fft2", "ifft2", "fftn", "ifftn", "rfft", "irfft", "rfft2", "irfft2",
    "cdist", "unfold", "adaptive_avg_pool1d", "adaptive_max_pool1d", "multinomial", "resize_",
}  # fmt: skip
# No result of an operation has more elements than all combinations of its operands'.
_MAX_COMBINATIONS = 2**24


def check_size(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a call whose result would be larger than the limit, without making it.

    Raises:
        CapacityError: OUT_OF_MEMORY.
    """
    if name not in FACTORIES and last_word(name) not in _GROWING:
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if math.prod(max(tensor.numel(), 1) for tensor in tensors) <= _MAX_COMBINATIONS:
            return
    size = _result_bytes(name, args, kwargs)
    if size > MAX_TENSOR_BYTES:
        raise error(
            Reason.OUT_OF_MEMORY,
            f"{name} would make tensors of {size:,} bytes, and at most {MAX_TENSOR_BYTES:,} may be "
            "made at once; use a slice, or a smaller size",
            bytes=size,
            maxBytes=MAX_TENSOR_BYTES,
        )


def _result_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Gives the size of an operation's result; 0 where only running it tells."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda part: part.to("meta"), (args, kwargs))
    if name in FACTORIES:
        kwargs = {**kwargs, "device": "meta"}
    try:
        with torch.device("meta"):
            result = function(name)(*args, **kwargs)
    except Exception:  # noqa: BLE001 - what is wrong with the call shows when it runs
        return 0
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, torch.Tensor)
    )

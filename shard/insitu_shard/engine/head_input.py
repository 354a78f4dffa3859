"""Gives the head what it is fast on.

Of a slice, such as the last positions that `logits_to_keep` leaves, torch may multiply each row of
the batch apart, with a copy of the weights for each, unless the weights are trained on: several
times as long, and 270 times with two threads in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_rows(hidden: torch.Tensor) -> torch.Tensor:
    """Gives the same values in one piece of memory, with the strides of one: [..., features]."""
    # A slice of one row counts as contiguous, but for its strides.
    return hidden.reshape(-1, hidden.shape[-1]).contiguous().view(hidden.shape)


def pack_head_input(module: PreTrainedModel) -> None:
    """Has a model's head, if it has one, get its argument in one piece of memory, always."""
    head = module.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        head.register_forward_pre_hook(_pack)


def _pack(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].numel():
        return None
    return (packed_rows(args[0]), *args[1:])

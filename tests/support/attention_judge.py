"""Attention computed by hand in plain transformers, with what is in its heads shown and changed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.tiny_models import TinyModels

AFTER_ROTARY = ("q_rotary", "k_rotary", "v", "scores", "pattern", "z")
# Their attention has no rotation between the projections and the scores.
WITHOUT_ROTARY = ("gpt2", "opt")

Seen = dict[tuple[int, str], torch.Tensor]


def eager_module(tiny: TinyModels, family: str) -> Any:
    """Loads a family's model with eager attention everywhere."""
    folder = tiny.folder(family)
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return module.eval()


@contextmanager
def by_hand(
    module: Any,
    changes: dict[tuple[int, str], Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> Iterator[Seen]:
    """Computes attention by hand for a while; gives what was there by layer and name.

    Args:
        module: the model.
        changes: what is made of a value, by layer and name.
    """
    seen: Seen = {}

    def at(layer: int, name: str, value: torch.Tensor) -> torch.Tensor:
        seen[layer, name] = value.clone()
        change = (changes or {}).get((layer, name))
        return value if change is None else change(value.clone())

    def attention(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number, groups = layer.layer_idx, query.shape[1] // key.shape[1]
        query = at(number, "q_rotary", query)
        key = at(number, "k_rotary", torch.repeat_interleave(key, groups, 1))
        value = at(number, "v", torch.repeat_interleave(value, groups, 1))
        scores = at(number, "scores", torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling + mask)
        weights = torch.softmax(scores.float(), -1)
        pattern = at(number, "pattern", weights.to(query.dtype))
        z = at(number, "z", torch.einsum("bhqk,bhkd->bhqd", pattern, value))
        return z.transpose(1, 2).contiguous(), pattern

    block = next(part for part in module.modules() if hasattr(part, "layer_idx"))
    file = sys.modules[type(block).__module__]
    with mock.patch.object(file, "eager_attention_forward", attention):
        yield seen


def projected(family: str, attention: Any, name: str, output: torch.Tensor) -> torch.Tensor:
    """Gives queries or keys before the rotation, [batch, head, position, head_dim].

    Args:
        family: the family.
        attention: its attention module.
        name: "q" or "k".
        output: what `projection` returned.
    """
    size = 16
    batch, length = output.shape[:2]
    match family:
        case "gpt_neox":
            parts = output.view(batch, length, -1, 3 * size).chunk(3, -1)
            return parts["qk".index(name)].transpose(1, 2)
        case "gpt2":
            output = output.split(64, -1)["qk".index(name)]
        case "phi3":
            output = output[..., :64] if name == "q" else output[..., 64:96]
        case "opt" if name == "q":
            output = output * attention.scaling
        case "gemma3":
            return output
        case "qwen3":
            return output.transpose(1, 2)
    return output.view(batch, length, -1, size).transpose(1, 2)


def projection(family: str, attention: Any, name: str) -> Any:
    """Gives the module that makes them."""
    names = {
        "gpt_neox": "query_key_value", "gpt2": "c_attn", "phi3": "qkv_proj",
        "gemma3": f"{name}_norm", "qwen3": f"{name}_norm",
    }  # fmt: skip
    return attention.get_submodule(names.get(family, f"{name}_proj"))

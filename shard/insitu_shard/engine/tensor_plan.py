"""Decides which of a model's weights are split over the ranks, and how.

transformers has a plan for most families. Where a rank would get a part of a head, the attention's
weights are split all the same, and what they give is joined; a family without a plan is whole on
every rank.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from insitu_shard.engine.conv1d_parallel import gpt2_rules
from insitu_shard.engine.transformers_internals import TensorParallelLayer, register_style
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig, PreTrainedModel

_ATTENTION = re.compile(r"\.\w*(attn|attention)\w*(\.|$)")
_WHOLE = "insitu_whole"

# What gives and takes whole tensors, while each rank has a part of the weights.
_JOINED = {
    "colwise": "colwise_gather_output",
    "colwise_gather_output": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
    "rowwise_split_input": "rowwise_split_input",
}


def tensor_plan(model: PreTrainedModel, num_ranks: int) -> dict[str, str]:
    """Gives the style of each module that is split; empty where every rank has the whole model.

    Args:
        model: the model, which may be without memory.
        num_ranks: how many ranks there are.
    """
    has_even_heads = _has_even_heads(model.config, num_ranks)
    if model.config.model_type == "gpt2":
        return gpt2_rules(has_even_heads=has_even_heads)
    plan = dict(getattr(model, "tp_plan", None) or {})
    return plan if has_even_heads else {**plan, **_joined_attention(plan)}


def has_plan(config: PretrainedConfig) -> bool:
    """Whether a model of this family can be split at all."""
    return config.model_type == "gpt2" or bool(getattr(config, "base_model_tp_plan", None))


def describe_plan(config: PretrainedConfig, plan: Mapping[str, str], num_ranks: int) -> str:
    """Says in one line how a model lies on its ranks."""
    if not plan:
        return (
            f"there is no tensor-parallel plan for {config.model_type}: each of the {num_ranks} "
            "ranks has the whole model"
        )
    if _has_even_heads(config, num_ranks):
        return f"the weights are split over {num_ranks} ranks"
    heads, kv_heads = _num_heads(config)
    return (
        f"the weights are split over {num_ranks} ranks; {heads} heads and {kv_heads} key-value "
        "heads do not divide by that, so each rank computes the whole attention"
    )


def check_ranks(config: PretrainedConfig, num_ranks: int) -> None:
    """Refuses more ranks than a model has heads.

    Raises:
        ConfigurationError: the model can not be split so; the message names what is possible.
    """
    heads, _ = _num_heads(config)
    if num_ranks > 1 and heads and num_ranks > heads:
        even = [n for n in range(1, heads + 1) if _has_even_heads(config, n)]
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"a model of {heads} attention heads can not be split over {num_ranks} ranks; use at "
            f"most {heads} (each rank has heads of its own with {', '.join(map(str, even))})",
            numRanks=num_ranks,
            numHeads=heads,
        )


def _has_even_heads(config: PretrainedConfig, num_ranks: int) -> bool:
    return all(num % num_ranks == 0 for num in _num_heads(config))


def _num_heads(config: PretrainedConfig) -> tuple[int, int]:
    """Gives the numbers of heads and of key-value heads; 0 for a model without attention."""
    text = config.get_text_config()
    heads: int = getattr(text, "num_attention_heads", None) or 0
    return heads, getattr(text, "num_key_value_heads", None) or heads


def _joined_attention(plan: Mapping[str, str]) -> dict[str, str]:
    rules = {name: style for name, style in plan.items() if _ATTENTION.search(name)}
    linear = {name: _JOINED[style] for name, style in rules.items() if style in _JOINED}
    others = set(rules.values()) - _JOINED.keys() - {"replicated_with_grad_allreduce"}
    register_style(_WHOLE, TensorParallelLayer())
    if others:
        return dict.fromkeys(rules, _WHOLE)
    return {**dict.fromkeys(rules, _WHOLE), **linear}

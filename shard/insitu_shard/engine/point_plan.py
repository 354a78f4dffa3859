"""Finds out where a model can show what is inside of its modules, and puts points there."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from insitu_shard.engine.attention_heads import attach_heads, can_show_heads
from insitu_shard.engine.common_names import is_attention
from insitu_shard.engine.measure import PROBE_SIZES, block_paths
from insitu_shard.engine.residual_middle import MiddleSearch, attach_middle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class PointPlan:
    """Where a model has points."""

    attentions: tuple[str, ...] = ()
    """Paths of the attention modules that show their heads."""
    middles: Mapping[str, str] = field(default_factory=dict)
    """Name of the child that is the first to take the sum of a block's input and its attention's
    output, by path of the block."""


def find_points(module: torch.nn.Module) -> PointPlan:
    """Finds where a model can have points, by a run of it without elements.

    Args:
        module: the whole model on the meta device, in a mode of fake tensors.
    """
    attentions = dict(_attentions(module))
    search = MiddleSearch()
    with ExitStack() as hooks, torch.no_grad():
        for path in block_paths(module):
            block = module.get_submodule(path)
            hooks.enter_context(search.watch(path, block, {*attentions.values()}))
        ids = torch.zeros(PROBE_SIZES[0], dtype=torch.long, device="meta")
        module(input_ids=ids, use_cache=False)
    shown = tuple(path for path, attention in attentions.items() if can_show_heads(attention))
    return PointPlan(shown, search.followers)


def attach_points(module: torch.nn.Module, plan: PointPlan) -> None:
    """Gives a model its points, whole or split over ranks."""
    attach_heads(module.get_submodule(path) for path in plan.attentions)
    for path, follower in plan.middles.items():
        attach_middle(module.get_submodule(path), follower)


def _attentions(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for path in sorted(block_paths(module)):
        for name, child in module.get_submodule(path).named_children():
            if is_attention(child) and any(weight.ndim > 1 for weight in child.parameters()):
                yield f"{path}.{name}", child

"""Shows the residual stream between a block's attention and its MLP.

No module gives it: the block adds what attention returned to its input, and hands the sum to the
norm before the MLP while it keeps the sum itself for later. So a write goes into that very tensor.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.points import Point

if TYPE_CHECKING:
    from collections.abc import Collection


def attach_middle(block: torch.nn.Module, follower: str) -> None:
    """Gives a block the point "resid_mid".

    Args:
        block: the block.
        follower: name of its child that is the first to take the sum.
    """
    point = Point("[batch, length, hidden]")
    block.add_module("resid_mid", point)
    sizes: list[torch.Size] = []

    def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes[:] = [_first(args, kwargs).shape]

    def show(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if point.is_watched:
            taken = _first(args, kwargs)
            shown = point(taken.reshape(sizes[0]).clone())
            taken.copy_(shown.reshape(taken.shape))

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.get_submodule(follower).register_forward_pre_hook(show, with_kwargs=True)


class MiddleSearch:
    """Finds the module that takes the sum, in one run without elements.

    It is the first child, after the attention, to take a tensor of the hidden state's size that no
    module has given and that is not what the block was called with. Blocks whose attention and MLP
    read the same state have none.

    Attributes:
        followers: what was found, by path of the block.
    """

    def __init__(self) -> None:
        self.followers: dict[str, str] = {}
        self._known: list[torch.Tensor] = []
        self._num_elements = 0
        self._has_attended = False

    def watch(
        self, path: str, block: torch.nn.Module, attentions: Collection[torch.nn.Module]
    ) -> ExitStack:
        """Looks at what goes through a block's modules until the stack is closed.

        Args:
            path: of the block.
            block: the block.
            attentions: the model's attention modules.
        """
        hooks = ExitStack()
        enter = block.register_forward_pre_hook(self._enter, with_kwargs=True)
        hooks.enter_context(enter)
        for name, child in block.named_children():
            take = partial(self._take, path, name)
            hooks.enter_context(child.register_forward_pre_hook(take, with_kwargs=True))
        for part in block.modules():
            give = partial(self._give, part in attentions)
            hooks.enter_context(part.register_forward_hook(give))
        return hooks

    def _enter(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _first(args, kwargs)
        self._known, self._num_elements, self._has_attended = [hidden], hidden.numel(), False

    def _take(
        self,
        path: str,
        name: str,
        _: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        taken = _first(args, kwargs)
        is_sum = (
            self._has_attended
            and isinstance(taken, torch.Tensor)
            and taken.numel() == self._num_elements
            and not any(_share_memory(taken, other) for other in self._known)
        )
        if is_sum:
            self.followers.setdefault(path, name)

    def _give(self, is_attention: bool, _: torch.nn.Module, __: object, result: object) -> None:
        self._known += [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self._has_attended |= is_attention


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    same: bool = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same

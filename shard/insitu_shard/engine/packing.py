"""Rows without their first positions, or of several lengths: [1, tokens, ...] for all of them.

What works on each token alone does not notice. For the attention, rows are put together: each from
its own positions and those of the lanes that it forks from.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, AttentionMaskInterface

from insitu_shard.engine.parts import NotPlacedError
from insitu_shard.engine.transformers_internals import sdpa_attention_forward, sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PretrainedConfig

_NAME = "insitu_packed"
_MASK_DIMS = 4


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the positions of all rows are among the tokens.

    Attributes:
        tokens: the token of each position, [rows, length].
        own: which of them are computed in their row, [rows, length].
    """

    tokens: torch.Tensor
    own: torch.Tensor

    @staticmethod
    def of(
        starts: Sequence[int], sources: Sequence[int], length: int, ends: Sequence[int] = ()
    ) -> Packing:
        """Makes a packing.

        Args:
            starts: the first position of each row that is computed in it.
            sources: the row that has what is before.
            length: positions of the longest row.
            ends: the position after the last of each row; not given, rows are of one length.
        """
        positions = torch.arange(length)
        own = positions >= torch.tensor(starts)[:, None]
        behind = positions >= torch.tensor(ends or [length] * len(starts))[:, None]
        own &= ~behind
        numbers = (own.flatten().cumsum(0) - 1).view_as(own)
        tokens = numbers
        above = torch.tensor(sources)
        while True:
            filled = torch.where(own, numbers, tokens[above])
            if torch.equal(filled, tokens):
                # No position sees what is behind it; yet nothing times nan is nan.
                return Packing(torch.where(behind, tokens[:, :1], tokens), own)
            tokens = filled

    @staticmethod
    def whole(num_rows: int, length: int) -> Packing:
        """Gives the packing of rows that have all their positions."""
        return Packing.of([0] * num_rows, range(num_rows), length)

    @property
    def is_whole(self) -> bool:
        """Whether each row has all its positions."""
        return bool(self.own.all())

    def spread(self, packed: Any) -> Any:
        """Gives rows of what is packed.

        Args:
            packed: a value of tensors [1, tokens, ...].

        Returns:
            The same of tensors [rows, length, ...].

        Raises:
            NotPlacedError: it is no such value.
        """
        num_tokens = int(self.own.sum())

        def spread(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.shape[:2] != (1, num_tokens):
                raise NotPlacedError(str(list(leaf.shape)))
            index = self.tokens.flatten().to(leaf.device)
            return leaf[0].index_select(0, index).view(*self.tokens.shape, *leaf.shape[2:])

        return pytree.tree_map_only(torch.Tensor, spread, packed)

    def gathered(self, rows: Any) -> Any:
        """Gives what is to be packed of a value of rows, [rows, length, ...]."""
        index = self.own.flatten().nonzero()[:, 0]

        def gathered(leaf: torch.Tensor) -> torch.Tensor:
            return leaf.flatten(0, 1).index_select(0, index.to(leaf.device)).unsqueeze(0)

        return pytree.tree_map_only(torch.Tensor, gathered, rows)

    def moved(self, hidden: torch.Tensor, rows: Sequence[int], into: Packing) -> torch.Tensor:
        """Gives the hidden state in another packing.

        Args:
            hidden: [1, tokens, hidden], or [rows, length, hidden] if this packing is whole.
            rows: the row here that each row there comes from.
            into: the packing there.
        """
        index = self.tokens[torch.tensor(rows)][into.own].to(hidden.device)
        shape = into.own.shape if into.is_whole else (1, len(index))
        return hidden.flatten(0, 1).index_select(0, index).view(*shape, -1)

    def fitted(self, arguments: Any, num_roots: int, roots: torch.Tensor) -> Any:
        """Gives what the model made for the rows that it began with, for the tokens.

        Args:
            arguments: of a block, but for the hidden state.
            num_roots: how many rows there were.
            roots: the one of them that each row here was.

        Raises:
            NotPlacedError: it is not known what an argument is.
        """
        length = self.own.shape[1]

        def fitted(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.ndim < 2 or leaf.shape[0] not in (1, num_roots):
                raise NotPlacedError(str(list(leaf.shape)))
            rows = leaf.expand(num_roots, *leaf.shape[1:])
            if leaf.ndim == _MASK_DIMS:  # the attention's: its queries and keys are whole rows
                return leaf if leaf.shape[0] == 1 else rows.index_select(0, roots.to(leaf.device))
            if leaf.shape[1] != length:
                raise NotPlacedError(str(list(leaf.shape)))
            row, position = self.own.nonzero().unbind(1)
            index = roots[row] * length + position
            return rows.flatten(0, 1).index_select(0, index.to(leaf.device)).unsqueeze(0)

        return pytree.tree_map_only(torch.Tensor, fitted, arguments)


_current: ContextVar[Packing | None] = ContextVar("packing", default=None)


def pack(packing: Packing | None) -> None:
    """Has attentions that follow take their tokens to be packed so; None for rows as ever."""
    _current.set(packing)


@contextmanager
def packed_attention(config: PretrainedConfig) -> Iterator[None]:
    """Has a model's attention understand packed tokens, in the block.

    Args:
        config: the model's, whose attention is "sdpa".
    """
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        pack(None)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    packing = _current.get()
    if packing is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    # [1, heads, tokens, size] to [rows, heads, length, size]
    query, key, value = (
        packing.spread(at.transpose(1, 2)).transpose(1, 2) for at in (query, key, value)
    )
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return packing.gathered(out), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)

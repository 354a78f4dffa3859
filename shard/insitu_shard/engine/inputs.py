"""Makes the model's inputs from rows of token ids. The one place that knows about padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig

    from insitu_shard.engine.graph import Invoke

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class InvokeRows:
    """Where an invoke's rows are in the batch."""

    first_row: int
    num_rows: int
    padding: int
    """Positions before the invoke's longest row begins."""
    length: int
    """Tokens in the invoke's longest row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of all invokes of a trace."""

    rows: Rows
    invokes: tuple[InvokeRows, ...]

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(map(len, self.rows))

    def slice_of(self, invoke: int) -> slice:
        """Gives where the rows of an invoke are.

        Args:
            invoke: its number, from 1; 0 for all rows.
        """
        if not invoke:
            return slice(0, len(self.rows))
        at = self.invokes[invoke - 1]
        return slice(at.first_row, at.first_row + at.num_rows)

    def at_step(self, step: int) -> Batch:
        """Gives the rows as a step of a generation sees them: the first all, others one token."""
        if not step:
            return self
        invokes = tuple(replace(at, padding=0, length=1) for at in self.invokes)
        return Batch(((0,),) * len(self.rows), invokes)

    @staticmethod
    def of(rows_of_invokes: Sequence[Rows]) -> Batch:
        """Puts the rows of invokes below each other."""
        longest = max(len(row) for rows in rows_of_invokes for row in rows)
        invokes = []
        first_row = 0
        for rows in rows_of_invokes:
            length = max(map(len, rows))
            invokes.append(InvokeRows(first_row, len(rows), longest - length, length))
            first_row += len(rows)
        return Batch(tuple(row for rows in rows_of_invokes for row in rows), tuple(invokes))


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What a forward pass is called with."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


def model_inputs(
    rows: Sequence[Sequence[int]], *, pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Gives the keyword arguments of the forward pass.

    Rows of equal length need no mask. Others are padded on the left, so that the last position of
    each row is its last token, with a mask and with position ids that count real tokens only (some
    models do not derive them).

    Returns:
        input_ids, and where rows differ in length attention_mask and position_ids, [rows, length].
    """
    length = max(map(len, rows))
    if all(len(row) == length for row in rows):
        return {"input_ids": torch.tensor(rows, device=device)}
    ids = [[pad_token_id] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    attention_mask = torch.tensor(mask, device=device)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
    }


def generation_inputs(
    rows: Sequence[Sequence[int]], *, pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Gives the arguments of transformers' `generate`, which makes position ids itself.

    Returns:
        input_ids and attention_mask, [rows, length].
    """
    inputs = model_inputs(rows, pad_token_id=pad_token_id, device=device)
    ids = inputs["input_ids"]
    # Without a mask, what looks like padding in a prompt would be taken for it.
    return {"input_ids": ids, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}


def state_bytes(config: PretrainedConfig, item_bytes: int) -> int:
    """Estimates what a cache of keys and values takes for each token, in bytes."""
    text = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * num_heads * head_dim * item_bytes)


def rows_of(invoke: Invoke, token_ids: object, vocab_size: int) -> Rows:
    """Gives an invoke's rows.

    Args:
        invoke: the invoke.
        token_ids: what its reference to token ids stands for, if it has one.
        vocab_size: how many token ids there are.

    Raises:
        InvalidTraceError: MALFORMED_SESSION, if that is not token ids.
    """
    if invoke.token_ids is None:
        return invoke.rows
    rows = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
    rows = [rows] if isinstance(rows, list | tuple) and not _are_rows(rows) else rows
    if _are_rows(rows):
        assert isinstance(rows, list | tuple)
        plain = tuple(tuple(map(_as_id, row)) for row in rows)
        if all(plain) and all(0 <= token < vocab_size for row in plain for token in row):
            return plain
    raise error(
        Reason.MALFORMED_SESSION,
        f"a trace runs over token ids from 0 to {vocab_size - 1}, or rows of them, and not over "
        f"{token_ids!r:.80}",
        vocabSize=vocab_size,
    )


def _are_rows(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(row, list | tuple | torch.Tensor) and getattr(row, "ndim", 1) for row in value
    )


def _as_id(token: object) -> int:
    if isinstance(token, torch.Tensor):
        token = token.item()
    return token if isinstance(token, int) else -1

"""Makes the model's inputs from rows of token ids. The one place that knows about padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


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

"""Turns what users call a prompt into rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from insitu_wire.errors import Location

Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Mapping[str, str]]
    | torch.Tensor
    | Mapping[str, Any]
)


def token_rows(
    prompt: Prompt, tokenizer: Callable[[], PreTrainedTokenizerBase], location: Location
) -> list[list[int]]:
    """Gives the token ids of each row, without padding.

    Args:
        prompt: see `LanguageModel.trace`.
        tokenizer: makes the tokenizer; called only for text.
        location: the user's line.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for anything else, or for an empty row.
    """
    rows = _rows(prompt, tokenizer)
    if not rows or not all(rows) or not all(_is_id(token) for row in rows for token in row):
        raise error(
            Reason.MALFORMED_SESSION,
            "a prompt is text, token ids, chat messages ({'role': ..., 'content': ...}), or a list "
            f"of these, and not empty; not {prompt!r:.80}",
            location=location,
        )
    return rows


def _rows(prompt: Any, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> list[Any]:
    match prompt:
        case str():
            return [tokenizer()(prompt)["input_ids"] if prompt else []]
        case Mapping() if "input_ids" in prompt:
            return _without_padding(prompt["input_ids"], prompt.get("attention_mask"))
        case torch.Tensor():
            return _rows(prompt.tolist(), tokenizer)
        case [{"role": _}, *_]:
            return [_chat(prompt, tokenizer())]
        case [int(), *_]:
            return [list(prompt)]
        case [_, *_]:
            return [row for item in prompt for row in _rows(item, tokenizer)]
    return [[]]


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives a conversation's tokens, up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _without_padding(ids: Any, mask: Any) -> list[list[int]]:
    rows = torch.as_tensor(ids)
    rows = rows[None] if rows.ndim == 1 else rows
    kept = torch.ones_like(rows) if mask is None else torch.as_tensor(mask).reshape(rows.shape)
    return [row[keep.bool()].tolist() for row, keep in zip(rows, kept, strict=True)]


def _is_id(token: object) -> bool:
    return isinstance(token, int) and 0 <= token < 2**32

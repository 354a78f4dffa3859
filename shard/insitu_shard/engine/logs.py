"""Formats what a session prints: a large tensor as its shape and statistics."""

from __future__ import annotations

import torch

_MAX_ELEMENTS = 64


def format_values(values: tuple[object, ...]) -> str:
    """Joins values by spaces, as print does."""
    return " ".join(_format(value) for value in values)


def _format(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > _MAX_ELEMENTS:
        return _summarize(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format, value))}]"
    return str(value)


def _summarize(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    text = f"tensor({dtype}{list(tensor.shape)}"
    if tensor.is_complex():
        return text + ")"
    numbers = tensor.float()
    return (
        f"{text}, min={numbers.min():.6g}, max={numbers.max():.6g}, "
        f"mean={numbers.mean():.6g}, std={numbers.std():.6g})"
    )

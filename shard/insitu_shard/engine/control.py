"""What values mean to control flow: truth, and items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable


def holds(value: object) -> bool:
    """Tells whether a condition holds.

    Raises:
        InterventionError: INTERVENTION_RAISED for a tensor of several elements.
    """
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise error(
            Reason.INTERVENTION_RAISED,
            f"a condition is one element, and this tensor is {list(value.shape)}; reduce it with "
            ".any() or .all()",
        )
    return bool(value)


def items_of(value: object) -> Iterable[object]:
    """Gives what a loop runs over: items of a list, tuple or dict, or the rows of a tensor.

    Numbers are given as tensors without dimensions, as what is done to them is torch's.

    Raises:
        InterventionError: INTERVENTION_RAISED for anything else.
    """
    is_scalar = isinstance(value, torch.Tensor) and not value.ndim
    if is_scalar or not isinstance(value, torch.Tensor | list | tuple | dict):
        kind = "a tensor without dimensions" if is_scalar else f"a {type(value).__name__}"
        raise error(
            Reason.INTERVENTION_RAISED,
            f"a loop runs over the items of a list, tuple or dict, or the rows of a tensor, and "
            f"not over {kind}",
        )
    return (
        torch.tensor(item) if isinstance(item, bool | int | float) else item for item in list(value)
    )

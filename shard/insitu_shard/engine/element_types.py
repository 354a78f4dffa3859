"""Which element types of weights a device can run a model in."""

from __future__ import annotations

import torch

from insitu_wire.errors import Reason, error

_NAMES = ("float32", "bfloat16", "float16", "float64")


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """Gives the element type of a name, such as "bfloat16".

    Raises:
        ConfigurationError: there is no such type, or the device can not run a model in it; the
            message names those that it can.
    """
    allowed = {at: getattr(torch, at) for at in _NAMES if is_usable(getattr(torch, at), device)}
    if name not in allowed:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"--dtype is {name!r}; on {device} it must be one of {', '.join(allowed)}, or be left "
            "out to take the weights as they are stored",
            dtype=name,
            device=device,
        )
    dtype: torch.dtype = allowed[name]
    return dtype


def is_usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Tells whether a device has what a model needs in an element type."""
    try:
        matrix = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.silu(matrix @ matrix)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return dtype.is_floating_point

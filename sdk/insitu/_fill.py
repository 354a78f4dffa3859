"""Makes saved proxies their values: the very same objects are then ordinary tensors."""

from __future__ import annotations

from typing import Any

import torch

from insitu._block_proxy import BlockOutput, BlockProxy
from insitu._origin import Container
from insitu._proxy import Proxy
from insitu_wire.errors import Reason, error


def fill(target: Any, value: Any) -> None:
    """Makes saved proxies their values, in place."""
    match target:
        case Container():
            target._fill(value)
        case Proxy() if isinstance(value, tuple | list | dict):
            raise error(
                Reason.VALUE_NOT_AVAILABLE,
                f"{target._origin} is a {type(value).__name__}, which could not be known while "
                "recording; save its items instead, as in value[0].save()",
                location=target._origin.location,
            )
        case Proxy():
            _fill_proxy(target, torch.as_tensor(value))
        case tuple() | list():
            for part, item in zip(target, value, strict=True):
                fill(part, item)
        case dict():
            for key, part in target.items():
                if isinstance(part, Proxy) and not isinstance(value[key], torch.Tensor):
                    target[key] = value[key]
                else:
                    fill(part, value[key])


def _fill_proxy(target: Proxy, value: torch.Tensor) -> None:
    # A tensor object of its own: the same value may have been saved under two names.
    tensor = value.detach()
    if isinstance(target, BlockProxy):
        tensor = tensor.as_subclass(BlockOutput)
    if target._also is not None:
        _become(target._also, value.detach())
    _become(target, tensor)


def _become(target: Proxy, tensor: torch.Tensor) -> None:
    try:
        torch.utils.swap_tensors(target, tensor)
    except RuntimeError as exception:
        raise error(
            Reason.VALUE_NOT_AVAILABLE,
            f"{target._origin} can not become its tensor ({exception}); keep no weak reference to "
            "a value before the session has run",
            location=target._origin.location,
        ) from exception

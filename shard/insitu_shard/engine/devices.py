"""Where a rank's model is, and values that go between its devices."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def rank_device(local_rank: int) -> torch.device:
    """Gives the device of a rank: a GPU of its own where this machine has any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def brought(value: Any, device: torch.device) -> Any:
    """Gives a value with its tensors on one device, where sessions compute."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def sent_back(written: Any, original: Any) -> Any:
    """Gives what was written with each tensor on the device of the one that it replaces."""
    return pytree.tree_map(_beside, written, original)


def _beside(new: Any, old: Any) -> Any:
    are_tensors = isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)
    return new.to(old.device) if are_tensors else new

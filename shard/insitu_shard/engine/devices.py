"""Where a rank's model is."""

from __future__ import annotations

import torch


def rank_device(local_rank: int) -> torch.device:
    """Gives the device of a rank: a GPU of its own where this machine has any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")

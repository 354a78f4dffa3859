"""Measures what passes take beside the weights, and corrects the estimates by it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from insitu_shard.compiler import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

# Less is lost in what else the process does.
_MIN_BYTES = 64 * 1024**2


@dataclass(slots=True)
class Peak:
    """What a pass has taken."""

    num_bytes: int = 0
    """Bytes beside what was there before; 0 where that can not be measured."""


class PassMemory:
    """What is known of the passes of one model."""

    def __init__(self) -> None:
        self._ratios = (1.0, 1.0)
        self._num_held = 0

    @property
    def ratio(self) -> float:
        """How many times more than their estimates the last passes took; 1 or more.

        One pass alone proves nothing: the first one reads weights into memory.
        """
        return max(min(self._ratios), 1.0)

    def within(self, limits: Limits) -> Limits:
        """Gives the limits to estimate by, so that what is measured stays in those given."""
        left = max(int(limits.max_bytes / self.ratio) - self._num_held, 0)
        return Limits(limits.max_tokens, left)

    def hold(self, num_bytes: int) -> None:
        """Takes note of memory that is held from pass to pass; less than 0 where it is freed."""
        self._num_held += num_bytes

    def learn(self, *, estimated: int, measured: int) -> None:
        """Takes note of what a pass took.

        Args:
            estimated: its estimate, in bytes.
            measured: what was measured, on the rank that took most.
        """
        if measured >= _MIN_BYTES:
            self._ratios = (self._ratios[1], measured / max(estimated, _MIN_BYTES))


@contextmanager
def measured(device: torch.device, estimated: int) -> Iterator[Peak]:
    """Measures the memory that the block takes at its peak, on a GPU or in this process.

    Args:
        device: where it runs.
        estimated: what it is to take, in bytes; if that is little, nothing is measured.
    """
    peak = Peak()
    before = _reset(device) if estimated >= _MIN_BYTES else None
    yield peak
    if before is not None:
        peak.num_bytes = max(_highest(device) - before, 0)


def _reset(device: torch.device) -> int | None:
    """Begins to measure, and gives what is in use; None where it can not be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # See proc_pid_clear_refs(5): resets the highest resident size.
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024

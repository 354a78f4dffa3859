"""What each rank of a group is like: the leader asks all of them at the same time."""

from __future__ import annotations

import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from insitu_shard.engine import LoadedModel

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank, now."""

    used_bytes: float
    """Memory in use: of its GPU, or of its process."""
    total_bytes: float
    """Memory that there is: its GPU's, or its part of what its pod or machine has."""
    cpu_seconds: float
    """CPU time of its process so far."""
    collective_seconds: float
    """Time that it has spent in collectives inside of passes; on GPUs, in starting them."""
    num_collectives: float
    """How many these were."""


def report_all(model: LoadedModel) -> list[RankReport]:
    """Gives the report of each rank. Every rank must call it."""
    own = torch.tensor(astuple(_report(model)), dtype=torch.float64)
    if model.ranks.size == 1:
        return [RankReport(*own.tolist())]
    gathered = [torch.empty_like(own) for _ in range(model.ranks.size)]
    dist.all_gather(gathered, own)
    return [RankReport(*numbers.tolist()) for numbers in gathered]


def _report(model: LoadedModel) -> RankReport:
    used, total = _memory(model.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    collectives = model.ranks.collectives
    return RankReport(used, total, time.process_time(), collectives.seconds, collectives.number)


def _memory(device: torch.device, num_ranks: int) -> tuple[int, int]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    return resident, _memory_limit() // num_ranks


def _memory_limit() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    try:
        return min(int(_CGROUP_LIMIT.read_text()), machine)
    except (OSError, ValueError):  # no control group, or one that says "max"
        return machine

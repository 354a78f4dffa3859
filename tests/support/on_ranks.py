"""Runs a function in several processes that are ranks of one group, over gloo, without a port."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from insitu_shard.engine.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = timedelta(seconds=60)


def on_ranks(function: Callable[..., Any], num_ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Calls function(ranks, *args) in a process a rank.

    Args:
        function: one of a module, for it is imported there.
        num_ranks: how many processes.
        folder: an empty one.
        args: what can be pickled.

    Returns:
        What each rank's call returned.
    """
    # As in a shard group: what takes long to import is imported once.
    torch.multiprocessing.set_forkserver_preload(["insitu", "insitu_shard.engine"])
    torch.multiprocessing.start_processes(
        _run, (function, num_ranks, str(folder), args), num_ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"result {rank}", weights_only=False) for rank in range(num_ranks)]


def _run(rank: int, function: Any, num_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
    )
    try:
        result = function(Ranks(rank, num_ranks), *args)
        torch.save(result, Path(folder) / f"result {rank}")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()

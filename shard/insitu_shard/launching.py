"""Starts the ranks of this node under torchrun's agent."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from types import FrameType

    from torch.distributed.launcher.api import LaunchConfig

    from insitu_shard.config import ShardConfig

_RENDEZVOUS_PORT = 29400
# What the agent itself may end the ranks on.
_AGENT_SIGNALS = "SIGHUP,SIGQUIT"


def launch_ranks(config: ShardConfig) -> None:
    """Starts `python -m insitu_shard` once a rank of this node, and waits for all of them.

    Raises:
        Error: a rank failed; what it printed says why.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    num_local = config.num_ranks // config.num_nodes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    stop = _Stop(is_ignored=config.node_rank > 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.ask)
    try:
        elastic_launch(_launch(config), sys.executable)("-m", "insitu_shard", *sys.argv[1:])
    except ChildFailedError as exception:
        if stop.is_asked:
            # Ranks that still loaded have no end of their own.
            return
        rank, failure = exception.get_first_failure()
        raise error(
            Reason.REPLICA_LOST,
            f"rank {rank} of {config.num_ranks} ended with status {failure.exitcode}; what it "
            "printed above says why",
            rank=rank,
            status=failure.exitcode,
        ) from None


@dataclass(slots=True)
class _Stop:
    """Passes on that the group is to end, and leaves it its time.

    The agent would do so, too, but kills after 30 seconds what has not ended by then.
    """

    is_ignored: bool
    """Whether it is not for this node to say: the leader ends the ranks of all nodes."""
    is_asked: bool = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self.is_ignored:
            return
        ranks = _children()
        if not ranks:
            raise SystemExit(0)
        self.is_asked = True
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _children() -> list[int]:
    """Gives the processes that this one has started."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def _launch(config: ShardConfig) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    if config.num_nodes == 1:
        return LaunchConfig(
            signals_to_handle=_AGENT_SIGNALS,
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
        )
    address = config.rendezvous
    return LaunchConfig(
        min_nodes=config.num_nodes,
        max_nodes=config.num_nodes,
        nproc_per_node=config.num_ranks // config.num_nodes,
        run_id="insitu",
        # Node 0 has rank 0: its address is the one that the group is registered with.
        rdzv_backend="static",
        rdzv_endpoint=address if ":" in address else f"{address}:{_RENDEZVOUS_PORT}",
        rdzv_configs={"rank": config.node_rank, "timeout": config.rendezvous_timeout_seconds},
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=_AGENT_SIGNALS,
    )

"""Starts the ranks of this node under torchrun's agent."""

from __future__ import annotations

import math
import os
import signal
import sys
import uuid
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from insitu_shard.config import ShardConfig

_RENDEZVOUS_PORT = 29400
# What the end of a group takes beside what runs.
_STOP_SECONDS = 10


def launch_ranks(config: ShardConfig) -> None:
    """Starts `python -m insitu_shard` once a rank of this node, and waits for all of them.

    Raises:
        Error: a rank failed; what it printed says why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    num_local = config.num_ranks // config.num_nodes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    if config.node_rank:
        # The leader ends the ranks of all nodes, after what runs has ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        elastic_launch(_launch(config), sys.executable)("-m", "insitu_shard", *sys.argv[1:])
    except SignalException:
        # The agent has passed the signal on, and all ranks have ended.
        return
    except ChildFailedError as exception:
        rank, failure = exception.get_first_failure()
        raise error(
            Reason.REPLICA_LOST,
            f"rank {rank} of {config.num_ranks} ended with status {failure.exitcode}; what it "
            "printed above says why",
            rank=rank,
            status=failure.exitcode,
        ) from None


def _launch(config: ShardConfig) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    # The leader ends the others after what runs has ended.
    shutdown_timeout = math.ceil(config.grace_seconds) + _STOP_SECONDS
    if config.num_nodes == 1:
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=config.max_restarts,
            monitor_interval=0.1,
            shutdown_timeout=shutdown_timeout,
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
        # Ranks of all nodes are started again together: by who started this.
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=shutdown_timeout,
        signals_to_handle="SIGHUP,SIGQUIT" if config.node_rank else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )

"""Starts the ranks of this node under torchrun's agent."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import uuid
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import TYPE_CHECKING

from insitu_shard.rank import run_as_rank
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from insitu_shard.config import ShardConfig

_START_METHOD = "forkserver"
_RENDEZVOUS_PORT = 29400
# What the end of a group takes beside what runs.
_STOP_SECONDS = 10


def launch_ranks(config: ShardConfig) -> None:
    """Checks the settings, starts the ranks of this node, and waits for all of them.

    Ranks are forked from a process that has imported what they need, which takes longer than to
    load a small model: it is done once, however many ranks there are and how often they start.

    Raises:
        Error: the group can not start, or a rank failed; what it printed says why.
    """
    with tempfile.TemporaryDirectory(prefix="insitu-shard-") as folder:
        # What ranks put aside goes with the group, however they end.
        os.environ["TMPDIR"] = folder
        _start_forking()
        config = _checked(config)
        if config.node_rank:
            _end_before_ranks(folder)
        _run(config)


def _end_before_ranks(folder: str) -> None:
    """Has SIGTERM end this node while it waits for the others, for an hour maybe.

    Once there are ranks the leader ends those of all nodes, after what runs has ended. What waits
    runs no handlers: so a thread of its own takes the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def take() -> None:
        while True:
            signal.sigwait({signal.SIGTERM})
            if not multiprocessing.active_children():
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)

    threading.Thread(target=take, name="stopping", daemon=True).start()


def _start_forking() -> None:
    """Starts the process that ranks are forked from; it goes on importing meanwhile."""
    # Asked otherwise whether there are GPUs, the process would take one, and its forks could not.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    preload = ["insitu_shard.rank", "insitu_shard.preflight", "insitu_shard.server"]
    multiprocessing.set_forkserver_preload(preload)
    forkserver.ensure_running()
    import torch.distributed.launcher.api  # noqa: F401 - meanwhile, what this process needs


def _run(config: ShardConfig) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        elastic_launch(_launch(config), run_as_rank)(config)
    except SignalException:
        # The agent has passed the signal on, and all ranks have ended.
        return
    except ChildFailedError as exception:
        rank, failure = exception.get_first_failure()
        raise error(
            Reason.REPLICA_LOST,
            f"rank {rank} of {config.num_ranks} {_how(failure.exitcode)}",
            rank=rank,
            status=failure.exitcode,
        ) from None


def _how(status: int) -> str:
    """Says how a process ended, by its exit status as Python has it."""
    if status == -signal.SIGKILL:
        return "was killed by signal 9, as the system does where memory runs out"
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with status {status}; what it printed above says why"


def _checked(config: ShardConfig) -> ShardConfig:
    """Gives the settings with the placement decided, by a process that knows the model's code."""
    context = multiprocessing.get_context(_START_METHOD)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_check, config).result()


def _check(config: ShardConfig) -> ShardConfig:
    from insitu_shard.placing import with_placement
    from insitu_shard.preflight import check_before_start

    config = with_placement(config)
    check_before_start(config)
    return config


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
            start_method=_START_METHOD,
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
        start_method=_START_METHOD,
        shutdown_timeout=shutdown_timeout,
        signals_to_handle="SIGHUP,SIGQUIT" if config.node_rank else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )

"""What the process of a rank does first, in a fork of one that has imported what it needs."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import setproctitle

from insitu_wire.errors import Error
from insitu_wire.logs import set_up_logging

if TYPE_CHECKING:
    from insitu_shard.config import ShardConfig

# It finds the place of a title beside the environment as the process got it: before that changes.
setproctitle.getproctitle()

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def run_as_rank(config: ShardConfig) -> None:
    """Runs the rank that torchrun's agent has made this process, until it is told to stop.

    An error of ours is one line on standard error and exit status 1.
    """
    import torch

    from insitu_shard.server import run_rank

    rank, num_local = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    setproctitle.setproctitle(f"insitu shard: rank {rank} of {config.model}")
    set_up_logging(config.log_format)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    if rank:
        # The leader alone is told when to stop; it tells the others after what runs has ended.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        run_rank(config, rank)
    except Error as err:
        sys.stderr.write(f"insitu shard: {err}\n")
        sys.exit(1)
    # An agent that has sent a signal waits for the end of the process, any other for its return.
    if not rank or signal.sigpending() & _STOP_SIGNALS:
        sys.exit(128 + signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

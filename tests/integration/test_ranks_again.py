"""Ranks that torchrun starts again find each other, and not those that died."""

from __future__ import annotations

import sys
from pathlib import Path

from support.up import run_python

_RANK = """
import os, signal, sys, torch, torch.distributed as dist
from insitu_shard.command_channel import bound_collectives, join_group
ranks = join_group(2, int(os.environ["RANK"]))
assert ranks.highest([ranks.rank]) == [1]
ranks.meet()
bound_collectives(ranks, 60.0)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
open(sys.argv[1], "a").write(f"{ranks.rank} has ended well;")
"""
_AGENT = """
import sys, uuid
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex,
    rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1, monitor_interval=0.1)
elastic_launch(config, sys.executable)(sys.argv[1], sys.argv[2])
"""


def test_ranks_come_back_after_one_died(tmp_path: Path) -> None:
    rank, agent, told = (tmp_path / name for name in ("rank.py", "agent.py", "told"))
    rank.write_text(_RANK)
    agent.write_text(_AGENT)
    done = run_python([sys.executable, str(agent), str(rank), str(told)], timeout=170)
    assert done.returncode == 0, done.stderr
    assert sorted(told.read_text().split(";")) == ["", "0 has ended well", "1 has ended well"]

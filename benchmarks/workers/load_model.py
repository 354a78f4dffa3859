"""One rank that loads a model and runs it: load_model.py FOLDER OUT NUM_RANKS, under torchrun."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from insitu_shard.engine import load_config
from insitu_shard.engine.loading import load_weights
from insitu_shard.engine.ranks import Ranks

TOKENS = (1, 32)


def status(field: str) -> int:
    """Gives a memory field of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def seconds(run: object) -> float:
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def main() -> None:
    folder, out, num_ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ["RANK"])
    if num_ranks > 1:
        dist.init_process_group("gloo")
    # What every program with torch and transformers takes, and their code for this family.
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = status("VmRSS")
    started_at = time.perf_counter()
    ranks = Ranks(rank, num_ranks)
    config = load_config(folder)
    module = load_weights(config, folder, dtype=None, ranks=ranks, device=torch.device("cpu"))
    load = time.perf_counter() - started_at

    def forward() -> None:
        with torch.no_grad():
            module(input_ids=torch.ones(TOKENS, dtype=torch.long), use_cache=False)

    first = seconds(forward)
    later = statistics.median(seconds(forward) for _ in range(3))
    measured = {
        "before": before,
        "load": load,
        "all": load + first - later,  # the first pass has waited for weights
        "forward": later,
        "peak": status("VmHWM"),
        "anonymous": status("RssAnon"),
        "files": status("RssFile"),
    }
    (out / f"{rank}.json").write_text(json.dumps(measured))
    print(rank, measured, file=sys.stderr)
    if num_ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What the head costs on the last positions of rows: as sliced, and in one piece of memory.

.venv/bin/python benchmarks/head_input.py
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser

import torch
from _subjects import machine

from insitu_shard.engine.head_input import packed_rows

ROUNDS = 10
WIDTH, VOCABULARY, LENGTH = 2048, 16_000, 64


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    num_rounds = 2 if parser.parse_args().quick else ROUNDS
    torch.set_num_threads(1)
    print(f"{machine()}; medians of {num_rounds} interleaved rounds, one thread\n")
    print("| element type, rows | sliced, ms | packed, ms | ratio |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
        for num_rows in (1, 8):
            sliced = torch.randn(num_rows, LENGTH, WIDTH, dtype=dtype)[:, -1:]
            rounds = [
                (_seconds(head, sliced), _seconds(head, sliced, packed_rows))
                for _ in range(num_rounds)
            ]
            one, other = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"| {name}, {num_rows} | {one:.1f} | {other:.1f} | {one / other:.1f} |")


@torch.no_grad()
def _seconds(head: torch.nn.Linear, hidden: torch.Tensor, prepare=lambda hidden: hidden) -> float:
    started = time.perf_counter()
    head(prepare(hidden))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

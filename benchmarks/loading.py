"""Loading a random model of about 1B weights: memory of each rank, and seconds beside a plain read.

Weights are mapped into memory, and come from the disk when they are first used: so what counts is
the load together with what the first forward pass takes more than a later one. `cold` has the page
cache without the files; `warm` has them in it. Each turn is processes of its own, one a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

HERE = Path(__file__).parent
SUBJECTS = ((1, "TP=1"), (2, "TP=2"))
CHUNK_BYTES = 16 * 1024**2


def make_model(folder: Path, dtype: torch.dtype, *, quick: bool) -> None:
    """Writes a random model over several files with an index."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
    if quick:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, vocab_size=32000, num_attention_heads=16, num_key_value_heads=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="10MB" if quick else "1GB")


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Has the operating system drop the files from its page cache."""
    for file in weights(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path) -> float:
    """Reads all bytes in order into one buffer; gives the seconds."""
    buffer = bytearray(CHUNK_BYTES)
    started_at = time.perf_counter()
    for file in weights(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started_at


def load(folder: Path, num_ranks: int) -> list[dict[str, float]]:
    """Loads it in processes of their own; gives what each rank measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks))}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with tempfile.TemporaryDirectory() as out:
        worker = [str(HERE / "workers" / "load_model.py"), str(folder), out, str(num_ranks)]
        subprocess.run([sys.executable, *launch, *worker], check=True, env=environment)
        return [json.loads(file.read_text()) for file in sorted(Path(out).iterdir())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small model: only sees that it runs"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        "| stored as | cache | read or loaded by | load s | all weights there s | ratio of a plain "
        "read's rate | a later forward s | peak MB a rank | of it before |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), dtype, quick=arguments.quick)
            for cache in ("cold", "warm"):
                measure(Path(folder), cache, str(dtype), 1 if arguments.quick else arguments.rounds)


def measure(folder: Path, cache: str, dtype: str, num_rounds: int) -> None:
    """Has the subjects take turns, and prints medians."""
    rounds = [turn(folder, cache) for _ in range(num_rounds)]
    gigabytes = sum(file.stat().st_size for file in weights(folder)) / 1e9
    read = statistics.median(found["read"]["load"] for found in rounds)
    start = f"| {dtype.removeprefix('torch.')}, {gigabytes:.2f} GB | {cache} |"
    print(f"{start} plain read | {read:.2f} | | 1.00 | | | |")
    for _, name in SUBJECTS:
        found = {key: statistics.median(at[name][key] for at in rounds) for key in rounds[0][name]}
        ratio = statistics.median(at["read"]["load"] / at[name]["all"] for at in rounds)
        print(
            f"{start} {name} | {found['load']:.2f} | {found['all']:.2f} | "
            f"{ratio:.2f} | {found['forward']:.2f} | {found['peak'] / 1e6:.0f} | "
            f"{found['before'] / 1e6:.0f} |",
            flush=True,
        )


def turn(folder: Path, cache: str) -> dict[str, dict[str, float]]:
    """Gives one round's measures by subject; of several ranks the highest."""
    prepare = forget if cache == "cold" else plain_read
    prepare(folder)
    found = {"read": {"load": plain_read(folder)}}
    for num_ranks, name in SUBJECTS:
        prepare(folder)
        ranks = load(folder, num_ranks)
        found[name] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    return found


if __name__ == "__main__":
    main()

"""Resident memory of every process while thousands of small sessions run, one after another.

`.venv/bin/python benchmarks/soak.py --sessions 5000`: a scheduler and a group of two ranks of a
tiny random model, four clients. Told at the start, after a tenth, after half, and at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from insitu import CONFIG, LanguageModel
from support.tiny_models import TinyModels
from support.up import Up

NUM_CLIENTS = 4


def small(model: LanguageModel, number: int) -> None:
    with model.session(remote=True) as session:
        with model.trace([number % 50 + 1, 5, 9, 17]):
            hidden = model.model.layers[1].output[0][:, -1, :]
        with model.trace([number % 40 + 2, 5, 9]):
            model.model.layers[0].output[0][:, -1, :] = hidden
            model.lm_head.output[0, -1].argmax().save()
        session.log("done")


def resident(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: one.memory_info().rss / 2**20 for name, one in processes.items()}


def named(up: Up) -> dict[str, psutil.Process]:
    """The processes by what they are."""
    found: dict[str, psutil.Process] = {"this one, with the clients": psutil.Process()}
    for one in up.descendants():
        line = " ".join(one.cmdline())
        kind = "scheduler" if "insitu_scheduler" in line else "group"
        found[f"{kind} {sum(name.startswith(kind) for name in found) + 1}"] = one
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=5000)
    parser.add_argument("--quick", action="store_true", help="only sees that it runs")
    found = parser.parse_args()
    count = 100 if found.quick else found.sessions
    with tempfile.TemporaryDirectory() as name:
        tiny = TinyModels(Path(name))
        model_flag = f"tiny/llama={tiny.folder('llama')}"
        with Up(Path(name, "data"), [model_flag], flags=["--tp", "2"]) as up:
            os.environ["INSITU_ENDPOINT"] = up.endpoint
            CONFIG.set_default_api_key("soak")
            model = LanguageModel("tiny/llama")
            small(model, 0)
            processes = named(up)
            columns = [resident(processes)]
            started = time.perf_counter()
            with ThreadPoolExecutor(NUM_CLIENTS) as threads:
                for tenth in range(10):
                    numbers = range(tenth * count // 10, (tenth + 1) * count // 10)
                    list(threads.map(lambda number: small(model, number), numbers))
                    columns.append(resident(processes))
            seconds = time.perf_counter() - started
    print(f"{count:,} sessions in {seconds:,.0f} s. Resident memory, MiB:\n")
    print("| process | at the start | after a tenth | after half | at the end | since a tenth |")
    print("|---|---|---|---|---|---|")
    for process in processes:
        start, warm, half, end = (columns[at][process] for at in (0, 1, 5, 10))
        print(
            f"| {process} | {start:.0f} | {warm:.0f} | {half:.0f} | {end:.0f} | {end - warm:+.1f} |"
        )


if __name__ == "__main__":
    main()

"""Bytes per second of a large saved result, from shard to client, beside a bare gRPC stream.

.venv/bin/python benchmarks/download.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

from _subjects import MODEL, ROOT, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 5
GIB = 1024**3
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of 128 MiB")
    is_quick = parser.parse_args().quick
    num_bytes, num_rounds = (GIB // 8, 2) if is_quick else (GIB, ROUNDS)
    demo = prepare_demo_model()
    with tempfile.TemporaryDirectory() as folder, server(MODEL, demo) as endpoint:
        stream = _bare_server(Path(folder))
        bare = Subject("stream_bytes.py", num_bytes, "read", model=stream[1], **ENVIRONMENT)
        environment = {**ENVIRONMENT, "INSITU_ENDPOINT": endpoint, "INSITU_API_KEY": "benchmark"}
        result = Subject("large_result.py", num_bytes, model=MODEL, **environment)
        rounds = [(_rate(bare, num_bytes), *_rates(result, num_bytes)) for _ in range(num_rounds)]
        for subject in (bare, result):
            subject.close()
        stream[0].terminate()
        stream[0].wait()
    print(f"{machine()}; medians of {num_rounds} rounds of {num_bytes / 2**20:,.0f} MiB\n")
    print("| | MB/s | of the bare stream |\n|---|---|---|")
    names = ("a bare gRPC stream", "the session, run and downloaded", "its download alone")
    for place, name in enumerate(names):
        rate = statistics.median(times[place] for times in rounds)
        ratio = statistics.median(times[place] / times[0] for times in rounds)
        print(f"| {name} | {rate / 1e6:,.0f} | {ratio:.2f} |")


def _rate(subject: Subject, num_bytes: int) -> float:
    return num_bytes / subject.seconds()


def _rates(subject: Subject, num_bytes: int) -> tuple[float, float]:
    """Gives the rate of the whole session, and that of fetching its result again."""
    return num_bytes / subject.seconds("run"), num_bytes / subject.seconds("fetch")


def _bare_server(folder: Path) -> tuple[subprocess.Popen[str], str]:
    script = ROOT / "workers" / "stream_bytes.py"
    process = subprocess.Popen([sys.executable, str(script), str(folder / "address"), "serve"])
    deadline = time.monotonic() + 120
    while not (folder / "address").is_file():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("the bare server did not start")
        time.sleep(0.1)
    return process, (folder / "address").read_text()


if __name__ == "__main__":
    main()

"""What the scheduler takes by itself: to accept sessions, to start again, and of each session.

A real scheduler, a process of its own, with its journal on disk; a shard group that plays a script
(`tests/support/fake_shard.py`), and clients, all in one other process. For recovery the scheduler
is killed with SIGKILL while sessions wait, and started again on the same folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from insitu_wire.limits import CHANNEL_OPTIONS
from support.fake_shard import FakeShard, saving

KEY = (("insitu-api-key", "benchmark"),)


def start(folder: Path, journal: str | None) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a scheduler and waits until it listens."""
    (folder / "scheduler.json").unlink(missing_ok=True)
    flags = ["--port", "0", "--metrics-port", "-1", "--data-dir", str(folder)]
    flags += ["--max-queued-sessions", "1000000", "--orphan-grace-seconds", "3600"]
    flags += ["--journal", journal] if journal else []
    command = [sys.executable, "-m", "insitu_scheduler", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (folder / "scheduler.json").exists():
        assert process.poll() is None, "the scheduler did not start"
        time.sleep(0.005)
    return process, json.loads((folder / "scheduler.json").read_text())["address"]


def quantiles(name: str, seconds: list[float]) -> None:
    ms = sorted(1000 * at for at in seconds)
    print(f"| {name} | {statistics.median(ms):.2f} | {ms[int(0.99 * (len(ms) - 1))]:.2f} |")


async def submit(stub: SchedulerServiceStub) -> str:
    request = pb.SubmitSessionRequest(
        request_id=str(uuid.uuid4()), session=saving(), is_detached=True
    )
    return (await stub.SubmitSession(request, metadata=KEY)).session_id


async def to_end(stub: SchedulerServiceStub) -> float:
    started = time.perf_counter()
    session_id = await submit(stub)
    async for _ in stub.WatchSession(pb.WatchSessionRequest(session_id=session_id), metadata=KEY):
        pass
    return time.perf_counter() - started


async def accepting(address: str, count: int) -> None:
    async with (
        FakeShard(address) as shard,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        await shard.ready()
        stub = SchedulerServiceStub(channel)
        whole = [await to_end(stub) for _ in range(max(count // 20, 20))]
        shard.hold.clear()
        times = []
        for _ in range(max(count // 20, 20)):
            started = time.perf_counter()
            await submit(stub)
            times.append(time.perf_counter() - started)
        print("\n| what | p50, ms | p99, ms |\n|---|---|---|")
        quantiles("submission to RECEIVED, one after another", times)
        quantiles("a whole session that computes nothing, its events watched", whole)
        started = time.perf_counter()
        for _ in range(0, count, 100):
            await asyncio.gather(*(submit(stub) for _ in range(100)))
        seconds = time.perf_counter() - started
        print(f"\n{count:,} sessions, 100 at a time: {count / seconds:,.0f} accepted a second.")


async def served(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = SchedulerServiceStub(channel)
        page, count = "", 0
        while True:
            request = pb.ListSessionsRequest(page_size=1000, page_token=page)
            answer = await stub.ListSessions(request, metadata=KEY)
            count, page = count + len(answer.sessions), answer.next_page_token
            if not page:
                return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only sees that it runs")
    parser.add_argument("--journal", help="of PostgreSQL; SQLite without it")
    found = parser.parse_args()
    count = 400 if found.quick else 10_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, address = start(folder, found.journal)
        try:
            asyncio.run(accepting(address, count))
            process.send_signal(signal.SIGKILL)
            process.wait()
            started = time.perf_counter()
            process, address = start(folder, found.journal)
            seconds = time.perf_counter() - started
            known = asyncio.run(served(address))
            process.send_signal(signal.SIGKILL)
            process.wait()
            with tempfile.TemporaryDirectory() as empty:
                started = time.perf_counter()
                process, _ = start(Path(empty), None)
                alone = time.perf_counter() - started
            print(
                f"\nAfter SIGKILL with {known:,} sessions in the journal the scheduler listens "
                f"after {seconds:.2f} s; with none after {alone:.2f} s."
            )
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

"""How long light users wait while one user floods, in simulated time: the fair queue beside FIFO.

The queue is the scheduler's own; time, users and groups are simulated: two replicas, one session at
a time each, session costs lognormal around 0.2 s, expectations off by a factor of e^N(0, 0.5).
Also counts how many decisions a second the queue makes with 100,000 sessions in it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.queue import SessionId, WaitingSession

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_REPLICAS = 2
NUM_LIGHT = 10
SECONDS = 600.0


@dataclass(frozen=True)
class Arrival:
    at: float
    user: str
    cost: float
    """What the session really costs, in seconds."""


class Fifo:
    """First come, first served: what the fair queue is compared with."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, WaitingSession] = OrderedDict()

    def push(self, waiting: WaitingSession) -> None:
        self._waiting[waiting.session_id] = waiting

    def pop(self, model: str, free: object, *, now: float) -> WaitingSession | None:
        return self._waiting.popitem(last=False)[1] if self._waiting else None

    def settle(self, waiting: WaitingSession, cost: float) -> None:
        pass


def light(rng: random.Random) -> Iterator[Arrival]:
    """Ten users who send a session every few seconds: together 46% of what the replicas can do."""
    for number in range(NUM_LIGHT):
        at = 0.0
        while (at := at + rng.expovariate(0.4)) < SECONDS:
            yield Arrival(at, f"light-{number}", rng.lognormvariate(-1.6, 0.5))


def steady_flood(rng: random.Random) -> Iterator[Arrival]:
    """Short sessions, more than three times what the replicas can do."""
    at = 0.0
    while (at := at + rng.expovariate(30)) < SECONDS:
        yield Arrival(at, "heavy", rng.lognormvariate(-1.6, 0.5))


def long_sessions(rng: random.Random) -> Iterator[Arrival]:
    """Sessions that cost ten times as much."""
    at = 0.0
    while (at := at + rng.expovariate(3)) < SECONDS:
        yield Arrival(at, "heavy", 10 * rng.lognormvariate(-1.6, 0.5))


def burst(rng: random.Random) -> Iterator[Arrival]:
    """Five hundred sessions at once."""
    for _ in range(500):
        yield Arrival(0.0, "heavy", rng.lognormvariate(-1.6, 0.5))


def simulate(queue: Fifo | FairQueue, arrivals: list[Arrival], seed: int) -> dict[str, list[float]]:
    """Gives every user's waits."""
    rng = random.Random(seed)
    ids = itertools.count()
    costs: dict[str, float] = {}
    waits: dict[str, list[float]] = {}
    ends: list[tuple[float, int, WaitingSession | None]] = [
        (0.0, number, None) for number in range(NUM_REPLICAS)
    ]
    coming = iter(sorted(arrivals, key=lambda arrival: arrival.at))
    following = next(coming, None)
    idle: list[int] = []
    while ends or following:
        if following and (not ends or following.at <= ends[0][0]):
            now = following.at
            name = str(next(ids))
            costs[name] = following.cost
            expected = following.cost * rng.lognormvariate(0, 0.5)
            queue.push(WaitingSession(SessionId(name), following.user, "m", expected, now))
            following = next(coming, None)
        else:
            now, replica, ended = heapq.heappop(ends)
            if ended is not None:
                queue.settle(ended, costs[ended.session_id])
            idle.append(replica)
        while idle and (waiting := queue.pop("m", {"m"}, now=now)):
            waits.setdefault(waiting.user, []).append(now - waiting.enqueued_at)
            heapq.heappush(ends, (now + costs[waiting.session_id], idle.pop(), waiting))
    return waits


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def compare(seeds: range) -> None:
    print("| heavy user | queue | light p50, s | light p99, s | FIFO's p99 / it |")
    print("|---|---|---|---|---|")
    for shape in (steady_flood, long_sessions, burst):
        found: dict[str, list[tuple[float, float]]] = {"FIFO": [], "fair": []}
        for seed in seeds:
            rng = random.Random(seed)
            arrivals = [*light(rng), *shape(rng)]
            for name, queue in (("FIFO", Fifo()), ("fair", FairQueue())):
                waits = simulate(queue, arrivals, seed)
                lights = [at for user, values in waits.items() if user != "heavy" for at in values]
                found[name].append((statistics.median(lights), p99(lights)))
        slow = statistics.median(at for _, at in found["FIFO"])
        for name, figures in found.items():
            middle = statistics.median(at for at, _ in figures)
            high = statistics.median(at for _, at in figures)
            print(f"| {shape.__name__} | {name} | {middle:.2f} | {high:.2f} | {slow / high:.0f} |")


def served_cost(num_sessions: int) -> None:
    """Ten users who always wait, one of whose sessions cost ten times the others'."""
    print("\n| queue | Jain's index over served cost |\n|---|---|")
    for name, queue in (("FIFO", Fifo()), ("fair", FairQueue())):
        rng, had = random.Random(0), Counter[str]()
        for number in range(num_sessions):
            user = f"user-{number % 10}"
            cost = (10 if number % 10 == 0 else 1) * rng.lognormvariate(-1.6, 0.5)
            queue.push(WaitingSession(SessionId(f"{number} {cost}"), user, "m", cost, 0.0))
        while waiting := queue.pop("m", {"m"}, now=0.0):
            had[waiting.user] += waiting.estimated_cost
            queue.settle(waiting, waiting.estimated_cost)
            if had.total() > 0.1 * num_sessions * 0.2:
                break
        print(f"| {name} | {jain(list(had.values())):.3f} |")


def decisions(num_queued: int, num_decisions: int) -> None:
    """Times pushes and pops of the real queue while it is full."""
    queue, rng = FairQueue(), random.Random(0)

    def session(number: int) -> WaitingSession:
        user = f"user-{rng.randrange(1000)}"
        return WaitingSession(SessionId(str(number)), user, "m", rng.uniform(0.1, 5), 0.0)

    for number in range(num_queued):
        queue.push(session(number))
    times = []
    for number in range(num_queued, num_queued + num_decisions):
        arriving = session(number)
        started = time.perf_counter()
        queue.push(arriving)
        served = queue.pop("m", {"m"}, now=0.0)
        assert served is not None
        queue.settle(served, served.estimated_cost)
        times.append(time.perf_counter() - started)
    print(
        f"\n{num_queued:,} sessions of 1,000 users wait; a push, a decision and a settlement take "
        f"{statistics.median(times) * 1e6:.0f} us (p99 {p99(times) * 1e6:.0f} us): "
        f"{num_decisions / sum(times):,.0f} a second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only sees that it runs")
    quick = parser.parse_args().quick
    compare(range(1 if quick else 5))
    served_cost(2_000 if quick else 20_000)
    decisions(10_000 if quick else 100_000, 1_000 if quick else 50_000)


if __name__ == "__main__":
    main()

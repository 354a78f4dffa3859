"""How long light users wait while one user floods, in simulated time: the scheduler beside FIFO.

Queue, registry and placement are the scheduler's own, driven by a virtual clock (`_simulation.py`);
users and groups are simulated: two replicas of a model, a session at a time each, sessions of one
or more traces, a trace lognormal around 0.2 s, expectations off by a factor of e^N(0, 0.5). With
faults, groups die at random and come back, and what ran on them is run again. Also counts how
many decisions a second the queue makes with 100,000 sessions in it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING

from _simulation import Arrival, Faults, Fifo, Simulation

from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.queue import SessionId, WaitingSession

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_LIGHT = 10
SECONDS = 600.0
QUANTUM = 2.0


def light(rng: random.Random) -> Iterator[Arrival]:
    """Ten users who send a session every few seconds: together 46% of what the replicas can do."""
    for number in range(NUM_LIGHT):
        at = 0.0
        while (at := at + rng.expovariate(0.4)) < SECONDS:
            yield Arrival(at, f"light-{number}", _traces(rng, 1))


def steady_flood(rng: random.Random) -> Iterator[Arrival]:
    """Sessions of one trace, more than three times what the replicas can do."""
    at = 0.0
    while (at := at + rng.expovariate(30)) < SECONDS:
        yield Arrival(at, "heavy", _traces(rng, 1))


def long_sessions(rng: random.Random) -> Iterator[Arrival]:
    """Sessions of forty traces, as much in all."""
    at = 0.0
    while (at := at + rng.expovariate(0.75)) < SECONDS:
        yield Arrival(at, "heavy", _traces(rng, 40))


def at_once(rng: random.Random) -> Iterator[Arrival]:
    """Twenty sessions of two hundred traces at the beginning."""
    for _ in range(20):
        yield Arrival(0.0, "heavy", _traces(rng, 200))


def burst(rng: random.Random) -> Iterator[Arrival]:
    """Five hundred sessions of one trace at the beginning."""
    for _ in range(500):
        yield Arrival(0.0, "heavy", _traces(rng, 1))


def _traces(rng: random.Random, count: int) -> tuple[float, ...]:
    return tuple(rng.lognormvariate(-1.6, 0.5) for _ in range(count))


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def compare(seeds: range, *, faults: bool) -> None:
    print(f"\nGroups {'die every 60 s' if faults else 'do not die'}; quantum {QUANTUM:g} s.\n")
    print("| heavy user | queue | light p50, s | light p99, s | longest trace, s | FIFO's / it |")
    print("|---|---|---|---|---|---|")
    for shape in (steady_flood, long_sessions, at_once, burst):
        found: dict[str, list[tuple[float, float, float]]] = {"FIFO": [], "fair": []}
        for seed in seeds:
            rng = random.Random(seed)
            arrivals = [*light(rng), *shape(rng)]
            longest = max(cost for arrival in arrivals for cost in arrival.traces)
            for name, queue in (("FIFO", Fifo()), ("fair", FairQueue(quantum_seconds=QUANTUM))):
                quantum = QUANTUM if name == "fair" else None
                dying = Faults(seed, every=60.0) if faults else None
                done = Simulation(queue, arrivals, seed, quantum=quantum, faults=dying).run()
                lights = [at for user, all_ in done.waits.items() if user != "heavy" for at in all_]
                found[name].append((statistics.median(lights), p99(lights), longest))
        slow = statistics.median(at for _, at, _ in found["FIFO"])
        for name, figures in found.items():
            middle, high, longest = (
                statistics.median(column) for column in zip(*figures, strict=True)
            )
            print(
                f"| {shape.__name__} | {name} | {middle:.2f} | {high:.2f} | {longest:.1f} "
                f"| {slow / high:.0f} |"
            )


def served_cost(num_sessions: int) -> None:
    """Ten users who always wait, one of whose sessions cost ten times the others'."""
    print("\n| queue | Jain's index over served cost |\n|---|---|")
    for name, queue in (("FIFO", Fifo()), ("fair", FairQueue())):
        rng, had = random.Random(0), Counter[str]()
        for number in range(num_sessions):
            user = f"user-{number % 10}"
            cost = (10 if number % 10 == 0 else 1) * rng.lognormvariate(-1.6, 0.5)
            queue.push(WaitingSession(SessionId(f"{number} {cost}"), user, "m", cost, 0.0))
        while found := queue.pop("m", lambda waiting: True, now=0.0):
            waiting = found[0]
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
    times, asking = [], []
    for number in range(num_queued, num_queued + num_decisions):
        arriving = session(number)
        started = time.perf_counter()
        queue.push(arriving)
        found = queue.pop("m", lambda waiting: True, now=0.0)
        assert found is not None
        queue.settle(found[0], found[0].estimated_cost)
        times.append(time.perf_counter() - started)
        if number % 50 == 0:
            started = time.perf_counter()
            queue.num_ahead("m", arriving.user)
            asking.append(time.perf_counter() - started)
    print(
        f"\n{num_queued:,} sessions of 1,000 users wait; a push, a decision and a settlement take "
        f"{statistics.median(times) * 1e6:.0f} us (p99 {p99(times) * 1e6:.0f} us): "
        f"{num_decisions / sum(times):,.0f} a second. A newcomer's position takes "
        f"{statistics.median(asking) * 1e6:.0f} us."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only sees that it runs")
    quick = parser.parse_args().quick
    for faults in (False, True):
        compare(range(1 if quick else 5), faults=faults)
    served_cost(2_000 if quick else 20_000)
    decisions(10_000 if quick else 100_000, 1_000 if quick else 50_000)


if __name__ == "__main__":
    main()

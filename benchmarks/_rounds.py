"""Rounds in which subjects take turns, and what is made of their times."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from _subjects import Subject

Round = dict[str, float]
"""Times by subject."""


def milliseconds(subject: Subject, run: str = "run", *, num_runs: int) -> float:
    """Runs a subject a few times in a row: the first after the others' turns finds cold caches."""
    return statistics.median(subject.seconds(run) for _ in range(num_runs)) * 1e3


def median(rounds: list[Round], of: Callable[[Round], float]) -> float:
    """Gives the median over rounds of what is taken within each."""
    return statistics.median(of(times) for times in rounds)


def print_beside_first(rounds: list[Round]) -> None:
    """Prints the subjects beside the first, in milliseconds, ratios and differences."""
    base = next(iter(rounds[0]))
    print("| subject | ms | ratio to plain | ms more than plain |\n|---|---|---|---|")
    for name in rounds[0]:
        ms = median(rounds, lambda times, name=name: times[name])
        ratio = median(rounds, lambda times, name=name: times[name] / times[base])
        more = median(rounds, lambda times, name=name: times[name] - times[base])
        print(f"| {name} | {ms:.1f} | {ratio:.2f} | {more:+.1f} |")


def difference(results: Any, others: Any) -> float:
    """Gives the largest difference between numbers of two results, however deep their lists."""
    if isinstance(results, list):
        pairs = zip(results, others, strict=True)
        return max((difference(one, other) for one, other in pairs), default=0.0)
    return abs(results - others)


def disagreeing(results: Mapping[str, Any], atol: float) -> dict[str, float]:
    """Gives the subjects whose results differ from the first's, and how much."""
    expected = next(iter(results.values()))
    found = {name: difference(result, expected) for name, result in results.items()}
    return {name: by for name, by in found.items() if not by <= atol}

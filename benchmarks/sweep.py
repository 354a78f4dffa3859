"""Activation patching, all layers by all positions: insitu, plain hooks, nnsight, interleaved.

make bench
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "workers"))

from _rounds import Round, difference, median
from _subjects import MODEL, NNSIGHT_PYTHON, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ATOL = 1e-4
# Of 8, 16 and 42 invokes a trace none did better by more than a tenth.
BATCH_SIZE = 32
PLAIN, NNSIGHT = "plain hooks, a forward a cell", "nnsight 0.8.1, a trace a cell"
LOCAL, REMOTE = "insitu, in process", "insitu, through a server"


@dataclass
class Competitor:
    """A subject, what of the sweep it is timed on, and what it answered."""

    subject: Subject
    run: str
    num_cells: int

    def __post_init__(self) -> None:
        self.cells: list[list[float]] = self.subject.result["sweep"]

    def milliseconds_a_trace(self) -> float:
        """Runs once; the clean trace counts as one."""
        return self.subject.seconds(self.run) * 1e3 / (self.num_cells + 1)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three layers, one round")
    quick = parser.parse_args().quick
    if quick:
        os.environ["SWEEP_LAYER_STEP"] = "10"
    folder = prepare_demo_model()
    with server(MODEL, folder) as address:
        for prompts in ("alike", "different"):
            print(f"\nPrompts that begin {prompts}:\n")
            os.environ["SWEEP_PROMPTS"] = prompts
            _measure(str(folder), address, (1, 10, 32) if quick else (5, 40, 128))


def _measure(folder: str, address: str, sizes: tuple[int, int, int]) -> None:
    num_rounds, sample_size, batched_sample_size = sizes
    competitors = _competitors(folder, address, sample_size, batched_sample_size)
    _check_agreement(competitors)
    rounds = [
        {name: each.milliseconds_a_trace() for name, each in competitors.items()}
        for _ in range(num_rounds)
    ]
    shares = _shares(competitors[LOCAL].subject, num_rounds)
    floor = _floor(competitors[PLAIN].subject)
    for each in competitors.values():
        each.subject.close()
    _print(competitors, rounds, shares)
    print(floor)


def _competitors(
    folder: str, address: str, sample_size: int, batched_sample_size: int
) -> dict[str, Competitor]:
    from _sweep import CELLS, sample

    def all_of_it(**env: str) -> Competitor:
        return Competitor(Subject("sweep_insitu.py", **env), "sweep", len(CELLS))

    def sampled(script: str, batch_size: int, python: Path | str = sys.executable) -> Competitor:
        size = sample_size if batch_size == 1 else batched_sample_size
        subject = Subject(script, size, batch_size, python=python, model=folder)
        return Competitor(subject, "sample", len(sample(size)))

    competitors = {
        PLAIN: sampled("sweep_plain.py", 1),
        f"plain hooks, {BATCH_SIZE} rows a forward": sampled("sweep_plain.py", BATCH_SIZE),
        LOCAL: all_of_it(model=folder),
        REMOTE: all_of_it(model=MODEL, INSITU_ENDPOINT=address, INSITU_API_KEY="bench"),
    }
    if NNSIGHT_PYTHON.exists():
        competitors[NNSIGHT] = sampled("sweep_nnsight.py", 1, NNSIGHT_PYTHON)
        competitors[f"nnsight 0.8.1, {BATCH_SIZE} invokes a trace"] = sampled(
            "sweep_nnsight.py", BATCH_SIZE, NNSIGHT_PYTHON
        )
    return competitors


def _check_agreement(competitors: dict[str, Competitor]) -> None:
    expected = competitors[PLAIN].cells
    off = {name: difference(each.cells, expected) for name, each in competitors.items()}
    if max(off.values()) > ATOL:
        sys.exit(f"the subjects do not agree: they differ from plain hooks by {off}")


def _shares(subject: Subject, num_rounds: int) -> dict[str, float]:
    """Gives the parts of a sweep's time that can be had alone, in a median round."""
    runs = ("sweep", "record", "decode", "explain")
    rounds = [{run: subject.seconds(run) for run in runs} for _ in range(num_rounds)]
    return {
        "recording": median(rounds, lambda times: times["record"] / times["sweep"]),
        "decoding": median(
            rounds, lambda times: (times["decode"] - times["record"]) / times["sweep"]
        ),
        "planning": median(
            rounds, lambda times: (times["explain"] - times["decode"]) / times["sweep"]
        ),
    }


def _floor(subject: Subject) -> str:
    """Says what the operations of the sweep take at the rate of large matrix products here."""
    needed, of_product = subject.result["operations"]
    rate = of_product / min(subject.seconds("products") for _ in range(20))
    return (
        f"It can not do without {needed / 1e9:.0f} billion floating-point operations: at the "
        f"{rate / 1e9:.0f} a second of matrix products here they take {needed / rate:.2f} s."
    )


def _print(
    competitors: dict[str, Competitor], rounds: list[Round], shares: dict[str, float]
) -> None:
    num_cells = competitors[LOCAL].num_cells
    expected = competitors[PLAIN].cells
    print(f"{machine()}; medians of {len(rounds)} interleaved rounds; {num_cells} cells\n")
    print(
        "| subject | cells timed | ms a trace | the sweep, s | plain / it | nnsight / it "
        "| peak memory, MiB | cells bit-equal to plain | largest difference |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name, each in competitors.items():
        ms = median(rounds, lambda times, name=name: times[name])
        equal = sum(one == other for one, other in zip(each.cells, expected, strict=True))
        timed = "all" if each.num_cells == num_cells else f"{each.num_cells}, scaled"
        print(
            f"| {name} | {timed} | {ms:.2f} | {ms * (num_cells + 1) / 1e3:.2f} "
            f"| {_ratio(rounds, PLAIN, name)} | {_ratio(rounds, NNSIGHT, name)} "
            f"| {_mebibytes(each.subject)} | {equal} | {difference(each.cells, expected):.1e} |"
        )
    adds = median(rounds, lambda times: times[REMOTE] / times[LOCAL])
    print(f"\nThrough a server the sweep takes {adds:.2f} of its time in process.")
    for part, share in shares.items():
        print(f"Of the sweep in process, {part} takes {share:.1%}.")


def _ratio(rounds: list[Round], base: str, name: str) -> str:
    """Gives how much less time a subject takes than another."""
    if base not in rounds[0]:
        return "-"
    return f"{median(rounds, lambda times: times[base] / times[name]):.1f}"


def _mebibytes(subject: Subject) -> str:
    peak = subject.result.get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:.0f}"


if __name__ == "__main__":
    main()

"""What standing inside a forward pass costs: insitu beside hand-written hooks, interleaved.

make bench
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from _rounds import Round, difference, median, milliseconds
from _subjects import NNSIGHT_PYTHON, Subject, machine
from transformers import AutoConfig

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3
LENGTHS = (16, 128)
# Threads that wait for a core which others use take more than what is measured here.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
ATOL = 0.5  # of sums over a whole hidden state, whose elements reach the thousands
PLAIN, INSITU, NNSIGHT = "hand-written hooks", "insitu", "nnsight 0.8.1"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of the short prompt")
    is_quick = parser.parse_args().quick
    num_rounds, lengths = (2, LENGTHS[:1]) if is_quick else (ROUNDS, LENGTHS)
    folder = str(prepare_demo_model())
    num_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    counts = {
        "the logits alone": 0,
        "and what one layer returns": 1,
        f"and what all {num_layers} layers return": num_layers,
    }
    of_what = f"{num_rounds} interleaved rounds of {RUNS_A_TURN} runs, one thread each"
    print(f"{machine()}; medians of {of_what}\n")
    for length in lengths:
        rounds = _measure(folder, list(counts.values()), length, num_rounds)
        _print(rounds, counts, length)


def _measure(folder: str, counts: list[int], length: int, num_rounds: int) -> list[Round]:
    arguments = (",".join(map(str, counts)), length)
    subjects = {
        PLAIN: Subject("reads_plain.py", *arguments, model=folder, **ENVIRONMENT),
        INSITU: Subject("reads_insitu.py", *arguments, model=folder, **ENVIRONMENT),
    }
    if NNSIGHT_PYTHON.exists():
        subjects[NNSIGHT] = Subject(
            "reads_nnsight.py", *arguments, python=NNSIGHT_PYTHON, model=folder, **ENVIRONMENT
        )
    for count in counts:
        results = {name: subject.result[f"run_{count}"] for name, subject in subjects.items()}
        off = {name: difference(sums, results[PLAIN]) for name, sums in results.items()}
        if max(off.values()) > ATOL:
            sys.exit(f"the subjects do not agree: they differ from {PLAIN} by {off}")
    rounds = [
        {
            f"{name} {count}": milliseconds(subject, f"run_{count}", num_runs=RUNS_A_TURN)
            for count in counts
            for name, subject in subjects.items()
        }
        for _ in range(num_rounds)
    ]
    for subject in subjects.values():
        subject.close()
    return rounds


def _print(rounds: list[Round], counts: dict[str, int], length: int) -> None:
    names = [name for name in (PLAIN, INSITU, NNSIGHT) if f"{name} 0" in rounds[0]]
    print(f"| {length} tokens; saved are | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for what, count in counts.items():
        cells = []
        for name in names:
            ms = median(rounds, lambda times, key=f"{name} {count}": times[key])
            ratio = median(
                rounds,
                lambda times, key=f"{name} {count}", base=f"{PLAIN} {count}": (
                    times[key] / times[base]
                ),
            )
            cells.append(f"{ms:.2f} ms ({ratio:.3f})")
        print(f"| {what} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()

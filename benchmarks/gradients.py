"""The gradient of one hidden state: plain autograd with a hook, and insitu.

make bench
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from _rounds import disagreeing, milliseconds, print_beside_first
from _subjects import MODEL, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3
LAYER = 15
LENGTHS = (16, 128, 512)
ATOL = 1e-4


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, short prompts")
    is_quick = parser.parse_args().quick
    folder = str(prepare_demo_model())
    print(f"{machine()}; medians of {2 if is_quick else ROUNDS} rounds of {RUNS_A_TURN} runs")
    with server(MODEL, folder) as address:
        for length in LENGTHS[:1] if is_quick else LENGTHS:
            print(f"\n{length} tokens\n")
            print_beside_first(_measured(folder, address, length, 2 if is_quick else ROUNDS))


def _measured(folder: str, address: str, length: int, num_rounds: int) -> list[dict[str, float]]:
    remote = {"INSITU_ENDPOINT": address, "INSITU_API_KEY": "bench"}
    subjects = {
        "plain autograd": Subject("gradient_plain.py", LAYER, length, model=folder),
        "insitu, in process": Subject("gradient_insitu.py", LAYER, length, model=folder),
        "insitu, through a server": Subject(
            "gradient_insitu.py", LAYER, length, model=MODEL, **remote
        ),
    }
    results = {name: subject.result["run"] for name, subject in subjects.items()}
    if off := disagreeing(results, ATOL):
        sys.exit(f"the subjects do not agree: they differ from plain transformers by {off}")
    rounds = [
        {name: milliseconds(each, num_runs=RUNS_A_TURN) for name, each in subjects.items()}
        for _ in range(num_rounds)
    ]
    for subject in subjects.values():
        subject.close()
    return rounds


if __name__ == "__main__":
    main()

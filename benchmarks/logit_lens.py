"""The logit lens over all layers, in one pass: plain hooks, insitu, nnsight, interleaved.

make bench
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from _rounds import disagreeing, milliseconds, print_beside_first
from _subjects import MODEL, NNSIGHT_PYTHON, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3
ATOL = 1e-4


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    num_rounds = 2 if parser.parse_args().quick else ROUNDS
    folder = str(prepare_demo_model())
    with server(MODEL, folder) as address:
        subjects = {
            "plain hooks, one forward": Subject("lens_plain.py", model=folder),
            "insitu, in process": Subject("lens_insitu.py", model=folder),
            "insitu, through a server": Subject(
                "lens_insitu.py", model=MODEL, INSITU_ENDPOINT=address, INSITU_API_KEY="bench"
            ),
        }
        if NNSIGHT_PYTHON.exists():
            subjects["nnsight 0.8.1, in process"] = Subject(
                "lens_nnsight.py", python=NNSIGHT_PYTHON, model=folder
            )
        results = {name: subject.result["run"] for name, subject in subjects.items()}
        if off := disagreeing(results, ATOL):
            sys.exit(f"the subjects do not agree: they differ from plain hooks by {off}")
        rounds = [
            {name: milliseconds(each, num_runs=RUNS_A_TURN) for name, each in subjects.items()}
            for _ in range(num_rounds)
        ]
        for subject in subjects.values():
            subject.close()
    print(f"{machine()}; medians of {num_rounds} interleaved rounds of {RUNS_A_TURN} runs\n")
    print_beside_first(rounds)


if __name__ == "__main__":
    main()

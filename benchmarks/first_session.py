"""Two forwards with one patch between them: plain transformers, insitu, nnsight, interleaved.

make bench
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from _rounds import median, milliseconds, print_beside_first
from _subjects import MODEL, NNSIGHT_PYTHON, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    num_rounds = 2 if parser.parse_args().quick else ROUNDS
    folder = prepare_demo_model()
    with server(MODEL, folder) as address:
        subjects = {
            "plain transformers, two forwards": Subject("plain.py", model=str(folder)),
            "insitu, in process": Subject("first_session.py", model=str(folder)),
            "insitu, through a server": Subject(
                "first_session.py", model=MODEL, INSITU_ENDPOINT=address, INSITU_API_KEY="bench"
            ),
        }
        if NNSIGHT_PYTHON.exists():
            subjects["nnsight 0.8.1, in process"] = Subject(
                "nnsight_local.py", python=NNSIGHT_PYTHON, model=str(folder)
            )
        results = {name: subject.result for name, subject in subjects.items()}
        if len({str(result) for result in results.values()}) > 1:
            sys.exit(f"the subjects do not agree: {results}")
        rounds = [
            {name: milliseconds(each, num_runs=RUNS_A_TURN) for name, each in subjects.items()}
            for _ in range(num_rounds)
        ]
        for subject in subjects.values():
            subject.close()
    print(f"{machine()}; medians of {num_rounds} interleaved rounds of {RUNS_A_TURN} runs\n")
    print_beside_first(rounds)
    local, remote = "insitu, in process", "insitu, through a server"
    adds = median(rounds, lambda times: times[remote] - times[local])
    print(f"\nThe server adds {adds:.1f} ms to the session in process.")


if __name__ == "__main__":
    main()

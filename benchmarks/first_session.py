"""Two forwards with one patch between them: plain transformers, insitu, nnsight, interleaved.

make bench
"""

from __future__ import annotations

import statistics
import sys

from _subjects import MODEL, NNSIGHT_PYTHON, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3


def main() -> None:
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
            {name: _milliseconds(subject) for name, subject in subjects.items()}
            for _ in range(ROUNDS)
        ]
        for subject in subjects.values():
            subject.close()
    _print(rounds)


def _milliseconds(subject: Subject) -> float:
    """Runs a subject a few times in a row: the first after the others' turns finds cold caches."""
    return statistics.median(subject.seconds() for _ in range(RUNS_A_TURN)) * 1e3


def _print(rounds: list[dict[str, float]]) -> None:
    base = next(iter(rounds[0]))
    print(f"{machine()}; medians of {len(rounds)} interleaved rounds of {RUNS_A_TURN} runs\n")
    print("| subject | ms | ratio to plain | ms more than plain |\n|---|---|---|---|")
    for name in rounds[0]:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times[base] for times in rounds)
        more = statistics.median(times[name] - times[base] for times in rounds)
        print(f"| {name} | {median:.1f} | {ratio:.2f} | {more:+.1f} |")
    local, remote = "insitu, in process", "insitu, through a server"
    adds = statistics.median(times[remote] - times[local] for times in rounds)
    print(f"\nThe server adds {adds:.1f} ms to the session in process.")


if __name__ == "__main__":
    main()

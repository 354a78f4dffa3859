"""Compares what is looked at in one layer: plain transformers and insitu, at several lengths."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from dataclasses import dataclass

from _rounds import Round, disagreeing, milliseconds, print_beside_first
from _subjects import MODEL, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 20
RUNS_A_TURN = 3
LAYER = 15
QUICK_LENGTHS = (16,)
SHORT = 128


@dataclass(frozen=True)
class Comparison:
    """What is compared: workers that take a model, a layer and a length."""

    name: str
    """What plain transformers is called in the table."""
    plain: str
    insitu: str
    lengths: tuple[int, ...]
    atol: float
    """How far results may be apart."""

    def print(self, description: str | None) -> None:
        """Measures, as the command line says, and prints the tables.

        Args:
            description: what the command line says of itself.
        """
        parser = ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="two rounds, short prompts")
        is_quick = parser.parse_args().quick
        folder = str(prepare_demo_model())
        print(machine())
        with server(MODEL, folder) as address:
            for length in QUICK_LENGTHS if is_quick else self.lengths:
                num_rounds = 2 if is_quick else _rounds(length)
                print(f"\n{length} tokens; medians of {num_rounds} rounds of {RUNS_A_TURN} runs\n")
                print_beside_first(self._measured(folder, address, length, num_rounds))

    def _measured(self, folder: str, address: str, length: int, num_rounds: int) -> list[Round]:
        remote = {"INSITU_ENDPOINT": address, "INSITU_API_KEY": "bench"}
        subjects = {
            self.name: Subject(self.plain, LAYER, length, model=folder),
            "insitu, in process": Subject(self.insitu, LAYER, length, model=folder),
            "insitu, through a server": Subject(self.insitu, LAYER, length, model=MODEL, **remote),
        }
        results = {name: subject.result["run"] for name, subject in subjects.items()}
        if off := disagreeing(results, self.atol):
            sys.exit(f"the subjects do not agree: they differ from plain transformers by {off}")
        rounds = [
            {name: milliseconds(each, num_runs=RUNS_A_TURN) for name, each in subjects.items()}
            for _ in range(num_rounds)
        ]
        for subject in subjects.values():
            subject.close()
        return rounds


def _rounds(length: int) -> int:
    """Gives how many rounds are worth their time: long runs differ less from each other."""
    return ROUNDS if length <= SHORT else ROUNDS // 4

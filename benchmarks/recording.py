"""What recording costs: a trace with 0, 1 and 12 reads beside hooks and nnsight, interleaved.

make bench
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import torch
from _subjects import NNSIGHT_PYTHON, Subject, machine
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 40
RUNS_A_TURN = 3
NUM_FIRST_TRACES = 5
COUNTS = (0, 1, 12)
PLAIN, INSITU, NNSIGHT = "plain hooks", "insitu", "nnsight 0.8.1"
RECORDINGS = (*(f"record_{count}" for count in COUNTS), "record_slices")
# One thread is as fast on a model of this size, and does not wait for a core that others use.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

Round = dict[tuple[str, str], float]
"""Microseconds by subject and run."""


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    num_rounds = 2 if parser.parse_args().quick else ROUNDS
    demo = prepare_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        _make_tiny_model(Path(folder), tokenizer=demo)
        subjects = {
            PLAIN: Subject("reads_plain.py", model=folder, **ENVIRONMENT),
            INSITU: Subject("reads_insitu.py", model=folder, **ENVIRONMENT),
        }
        if NNSIGHT_PYTHON.exists():
            subjects[NNSIGHT] = Subject(
                "reads_nnsight.py", python=NNSIGHT_PYTHON, model=folder, **ENVIRONMENT
            )
        session = Subject("recorded_session.py", model=str(demo), **ENVIRONMENT)
        _check_agreement(subjects)
        rounds = [_round(subjects, session) for _ in range(num_rounds)]
        firsts = [
            statistics.median(subject.seconds("record_first") for _ in range(NUM_FIRST_TRACES))
            for subject in (subjects[INSITU], session)
        ]
        for subject in (*subjects.values(), session):
            subject.close()
    print(f"{machine()}; medians of {num_rounds} interleaved rounds of {RUNS_A_TURN} runs\n")
    _print_traces(rounds, list(subjects))
    _print_recordings(rounds, firsts)
    sizes = session.result
    print(
        f"\nThe first session's SubmitSession request takes {sizes['num_bytes']:,} bytes, "
        f"{sizes['locations']:,} of them the lines of the user's code."
    )


def _make_tiny_model(folder: Path, *, tokenizer: Path) -> None:
    """Makes a model so small that what stands around it can be seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def _check_agreement(subjects: dict[str, Subject]) -> None:
    for count in COUNTS:
        results = {name: subject.result[f"run_{count}"] for name, subject in subjects.items()}
        if len({str(result) for result in results.values()}) > 1:
            sys.exit(f"the subjects do not agree: {results}")


def _round(subjects: dict[str, Subject], session: Subject) -> Round:
    times: Round = {}
    for count in COUNTS:
        for name, subject in subjects.items():
            times[name, f"run_{count}"] = _microseconds(subject, f"run_{count}")
    for run in RECORDINGS:
        times[INSITU, run] = _microseconds(subjects[INSITU], run)
    times["session", "record"] = _microseconds(session, "record")
    return times


def _microseconds(subject: Subject, run: str) -> float:
    """Runs a few times in a row: the first after the others' turns finds cold caches."""
    return statistics.median(subject.seconds(run) for _ in range(RUNS_A_TURN)) * 1e6


def _print_traces(rounds: list[Round], names: list[str]) -> None:
    print("| trace | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for count in COUNTS:
        cells = []
        for name in names:
            milliseconds = statistics.median(times[name, f"run_{count}"] for times in rounds) / 1e3
            ratio = statistics.median(
                times[name, f"run_{count}"] / times[PLAIN, f"run_{count}"] for times in rounds
            )
            cells.append(f"{milliseconds:.2f} ms ({ratio:.2f})")
        print(f"| {count} reads | " + " | ".join(cells) + " |")
    per_trace = [_median(rounds, name, "run_0", PLAIN, "run_0") for name in names]
    per_read = [_median(rounds, name, "run_12", name, "run_0") / 12 for name in names]
    print("| more than plain, a trace | " + " | ".join(f"{us:,.0f} us" for us in per_trace) + " |")
    print("| more, a read | " + " | ".join(f"{us:,.0f} us" for us in per_read) + " |")


def _print_recordings(rounds: list[Round], firsts: list[float]) -> None:
    def median(name: str, run: str) -> float:
        return statistics.median(times[name, run] for times in rounds)

    per_read = _median(rounds, INSITU, "record_12", INSITU, "record_0") / 12
    per_operation = _median(rounds, INSITU, "record_slices", INSITU, "record_12") / 12
    print("\n| recording, without running | us |\n|---|---|")
    print(f"| a trace that saves the logits | {median(INSITU, 'record_0'):,.0f} |")
    print(f"| each read that is saved | {per_read:,.0f} |")
    print(f"| each operation, its shape inferred | {per_operation:,.0f} |")
    print(f"| a trace with 12 reads | {median(INSITU, 'record_12'):,.0f} |")
    print(f"| the same, the first of a model | {firsts[0] * 1e6:,.0f} |")
    print(f"| the first session, SmolLM2-135M | {median('session', 'record'):,.0f} |")
    print(f"| the same, the first of a model | {firsts[1] * 1e6:,.0f} |")


def _median(rounds: list[Round], name: str, run: str, base_name: str, base: str) -> float:
    """Gives the median of differences, each taken within a round."""
    return statistics.median(times[name, run] - times[base_name, base] for times in rounds)


if __name__ == "__main__":
    main()

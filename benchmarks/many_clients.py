"""Sixteen clients with a small session each, at one server: all at once, and one after another.

make bench
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser

from _rounds import Round, difference, median
from _subjects import MODEL, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

NUM_CLIENTS = 16
ROUNDS = 10
SESSIONS_A_TURN = 3
ATOL = 1e-4
ONE_LENGTH = [
    "The capital of France is the city of",
    "The capital of Italy is the city of",
    "The capital of Spain is the city of",
    "The capital of Japan is the city of",
    "The largest animal in the ocean is the",
    "Water boils at one hundred degrees and freezes",
    "Two plus two is four, and three",
    "The sun rises in the east and sets",
    "She opened the door and saw that the",
    "The opposite of hot is the word for",
    "In the morning he likes to drink some",
    "The president of the United States lives in",
    "The dog ran after the cat into the",
    "The first man on the moon was Neil",
    "My favourite colour of all is the bright",
    "The author of Romeo and Juliet was William",
]  # 8 tokens each
MANY_LENGTHS = [
    *ONE_LENGTH[:4],
    "The Eiffel Tower is in the city of",
    "The color of the clear sky at noon is",
    "Mount Everest is the highest of all mountains on",
    "A year has twelve months and a week has seven",
    "Two plus two is four, and three plus four",
    "Birds fly in the sky, and fish swim in the",
    "When the rain had stopped we all went out into the",
    "One hundred divided by ten is the same as five times",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday",
    "If you mix blue and yellow paint, you get the colour",
    "The old man and his dog went for a walk in the",
    "The train from London to Paris goes through the tunnel under the",
]  # 8 to 12 tokens


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four clients, two rounds")
    quick = parser.parse_args().quick
    num_clients, num_rounds = (4, 2) if quick else (NUM_CLIENTS, ROUNDS)
    folder = str(prepare_demo_model())
    asked = [
        {"number": number, "one_length": ONE_LENGTH[number], "many_lengths": MANY_LENGTHS[number]}
        for number in range(num_clients)
    ]
    with server(MODEL, folder) as address:
        clients = [_client(each, address) for each in asked]
        _check_agreement(clients, Subject("small_session.py", json.dumps(asked), 1, model=folder))
        rounds = [_round(clients) for _ in range(num_rounds)]
        for client in clients:
            client.close()
    _print(rounds, num_clients)


def _client(asked: dict[str, object], address: str) -> Subject:
    """Starts a client: a process, and a user, of its own."""
    return Subject(
        "small_session.py",
        json.dumps([asked]),
        SESSIONS_A_TURN,
        model=MODEL,
        INSITU_ENDPOINT=address,
        INSITU_API_KEY=f"bench-{asked['number']}",
    )


def _check_agreement(clients: list[Subject], in_process: Subject) -> None:
    """Compares with the same sessions in one process."""
    in_process.close()
    for run, expected in in_process.result.items():
        results = [client.result[run][0] for client in clients]
        if (off := difference(results, expected)) > ATOL:
            sys.exit(f"the clients' results differ from those in process by {off}: {run}")


def _round(clients: list[Subject]) -> Round:
    """Gives sessions a second, one after another and all at once."""
    num_sessions = len(clients) * SESSIONS_A_TURN
    times: Round = {}
    for run in ("one_length", "many_lengths"):
        started = time.perf_counter()
        for client in clients:
            client.seconds(run)
        times[f"{run}, one after another"] = num_sessions / (time.perf_counter() - started)
        started = time.perf_counter()
        for client in clients:
            client.begin(run)
        for client in clients:
            client.end()
        times[f"{run}, all at once"] = num_sessions / (time.perf_counter() - started)
    return times


def _print(rounds: list[Round], num_clients: int) -> None:
    print(
        f"{machine()}; medians of {len(rounds)} rounds; {num_clients} clients, each with "
        f"{SESSIONS_A_TURN} sessions in a row\n"
    )
    print("| prompts | one after another, sessions/s | all at once, sessions/s | ratio |")
    print("|---|---|---|---|")
    for run, prompts in (("one_length", "8 tokens each"), ("many_lengths", "8 to 12 tokens")):
        serial, together = f"{run}, one after another", f"{run}, all at once"
        print(
            f"| {prompts} | {median(rounds, lambda times, name=serial: times[name]):.1f} "
            f"| {median(rounds, lambda times, name=together: times[name]):.1f} "
            f"| {median(rounds, lambda times, a=together, b=serial: times[a] / times[b]):.2f} |"
        )


if __name__ == "__main__":
    main()

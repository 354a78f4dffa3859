"""Steered generation: beside plain `generate` with a hook and nnsight; and eight users at once.

make bench
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser

from _rounds import Round, disagreeing, median, milliseconds, print_beside_first
from _subjects import MODEL, NNSIGHT_PYTHON, Subject, machine, server

from insitu.cli._demo_model import prepare_demo_model

ROUNDS = 10
NUM_TOKENS = 64
LAYER = 15
# One token each, so that the prompts are of one length.
FIRST_WORDS = ["The", "This", "That", "Our", "Their", "His", "Her", "Your"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, few tokens, three users")
    quick = parser.parse_args().quick
    num_rounds, num_tokens = (2, 4) if quick else (ROUNDS, NUM_TOKENS)
    folder = str(prepare_demo_model())
    print(f"{machine()}; medians of {num_rounds} rounds; {num_tokens} tokens\n")
    with server(MODEL, folder) as address:
        print_beside_first(_alone(folder, address, num_rounds, num_tokens))
        _print_users(_users(folder, address, num_rounds, num_tokens, 3 if quick else 8))


def _alone(folder: str, address: str, num_rounds: int, num_tokens: int) -> list[Round]:
    remote = {"INSITU_ENDPOINT": address, "INSITU_API_KEY": "bench"}
    asked = (LAYER, num_tokens)
    subjects = {
        "plain generate with a hook": Subject("generate_plain.py", *asked, model=folder),
        "insitu, in process": Subject("generate_insitu.py", *asked, "The", model=folder),
        "insitu, through a server": Subject(
            "generate_insitu.py", *asked, "The", model=MODEL, **remote
        ),
    }
    if NNSIGHT_PYTHON.exists():
        subjects["nnsight 0.8.1, in process"] = Subject(
            "generate_nnsight.py", *asked, python=NNSIGHT_PYTHON, model=folder
        )
    results = {name: subject.result["run"] for name, subject in subjects.items()}
    if off := disagreeing(results, 0):
        sys.exit(f"the subjects do not generate the same tokens: {off}")
    rounds = [
        {name: milliseconds(each, num_runs=1) for name, each in subjects.items()}
        for _ in range(num_rounds)
    ]
    for subject in subjects.values():
        subject.close()
    return rounds


def _users(
    folder: str, address: str, num_rounds: int, num_tokens: int, num_users: int
) -> list[Round]:
    words = FIRST_WORDS[:num_users]
    users = [_user(word, num_tokens, MODEL, INSITU_ENDPOINT=address) for word in words]
    for word, user in zip(words, users, strict=True):
        alone = _user(word, num_tokens, folder)
        alone.close()
        if user.result["run"] != alone.result["run"]:
            sys.exit(f"the user of {word!r} does not get the tokens that are generated in process")
    rounds = [_turns(users) for _ in range(num_rounds)]
    for user in users:
        user.close()
    return rounds


def _user(word: str, num_tokens: int, model: str, **env: str) -> Subject:
    key = {"INSITU_API_KEY": f"bench-{word}"}
    return Subject("generate_insitu.py", LAYER, num_tokens, word, model=model, **env, **key)


def _turns(users: list[Subject]) -> Round:
    started = time.perf_counter()
    for user in users:
        user.seconds()
    one_by_one = time.perf_counter() - started
    started = time.perf_counter()
    for user in users:
        user.begin()
    for user in users:
        user.end()
    return {"one by one": one_by_one, "at once": time.perf_counter() - started, "users": len(users)}


def _print_users(rounds: list[Round]) -> None:
    one_by_one = median(rounds, lambda times: times["one by one"])
    at_once = median(rounds, lambda times: times["at once"])
    ratio = median(rounds, lambda times: times["one by one"] / times["at once"])
    print("\n| users | one by one, s | at once, s | times as fast |\n|---|---|---|---|")
    print(f"| {rounds[0]['users']} | {one_by_one:.1f} | {at_once:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()

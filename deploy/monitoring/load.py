"""Four users' sessions for some minutes, so that there is something to see.

`INSITU_ENDPOINT=HOST:PORT python deploy/monitoring/load.py --minutes 5`, while `insitu up
--monitoring` serves the demo model.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from argparse import ArgumentParser
from typing import TYPE_CHECKING

import torch

from insitu import LanguageModel

if TYPE_CHECKING:
    from insitu import Submission

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The Eiffel Tower is in the city of"
USERS = ("ann", "bob", "cleo", "dan")
_BURST = 14
_PAUSE_SECONDS = 20.0


def main() -> None:
    """Has each user work in a process, for API keys are of a process."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    seconds = 60 * parser.parse_args().minutes
    spawning = multiprocessing.get_context("spawn")
    processes = [spawning.Process(target=work, args=(user, seconds)) for user in USERS]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def work(user: str, seconds: float) -> None:
    """Submits bursts of sessions and waits for them, for some seconds."""
    os.environ["INSITU_API_KEY"] = user
    model, chance = LanguageModel(MODEL), random.Random(user)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        submissions = [_submit(model, chance) for _ in range(chance.randint(1, _BURST))]
        for submission in submissions:
            submission.result()
        time.sleep(chance.uniform(0, _PAUSE_SECONDS))


def _submit(model: LanguageModel, chance: random.Random) -> Submission:
    layers = range(len(model.model.layers))
    with model.session(remote=True, blocking=False) as session:
        match chance.randrange(4):
            case 0:  # a sweep: one layer's output is taken out, trace by trace
                for layer in chance.sample(layers, 8):
                    with model.trace(PROMPT):
                        model.model.layers[layer].output[0][:, -1] = 0
                        model.lm_head.output[0, -1].argmax().save()
            case 1:  # large results
                with model.trace(PROMPT):
                    for layer in layers:
                        model.model.layers[layer].output[0].save()
            case 2:
                with model.generate(PROMPT, max_new_tokens=12) as tracer:
                    tracer.result.save()
            case _:  # a vector that the user brings, a value that stays
                vector = torch.randn(model.config.hidden_size)
                with model.trace(PROMPT):
                    model.model.layers[10].output[0][:, -1] += vector
                    model.model.layers[20].output[0].keep()
    return session.submission


if __name__ == "__main__":
    main()

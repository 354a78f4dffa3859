"""Small sessions of clients, over a prompt each: on the server of INSITU_ENDPOINT, or here."""

import json
import logging
import os
import sys
from functools import partial

from _serve import serve

from insitu import LanguageModel

clients, num_sessions = json.loads(sys.argv[2]), int(sys.argv[3])
logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
remote = "INSITU_ENDPOINT" in os.environ


def session_over(prompt, number):
    """Reads a hidden state; every second client writes, and reads the best logits."""
    with model.session(remote=remote), model.trace(prompt):
        if number % 2:
            model.model.layers[number].mlp.output[:, -1] = 0
            kept = model.lm_head.output[0, -1].topk(3).values.save()
        else:
            kept = model.model.layers[number].output[0, -1, :3].save()
    return kept.tolist()


def run(prompts):
    return [
        session_over(client[prompts], client["number"])
        for client in clients
        for _ in range(num_sessions)
    ]


serve(one_length=partial(run, "one_length"), many_lengths=partial(run, "many_lengths"))

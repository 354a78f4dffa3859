"""A steered generation in insitu, in this process or on the server that the environment names.

Arguments: the model, a layer, how many tokens, and the first word of the prompt.
"""

import logging
import os
import sys

import torch
from _serve import serve

from insitu import LanguageModel

logging.getLogger("insitu").setLevel(logging.WARNING)
name, layer, num_tokens, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = LanguageModel(name)
direction = torch.linspace(-1, 1, model.config.hidden_size)
options = {"eos_token_id": None, "do_sample": False, "remote": "INSITU_ENDPOINT" in os.environ}


def run():
    prompt = f"{first} Eiffel Tower is in the city of"
    with model.generate(prompt, max_new_tokens=num_tokens, **options) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[layer].output[:, -1] += direction
        ids = tracer.result.save()
    return ids.tolist()


serve(run=run)

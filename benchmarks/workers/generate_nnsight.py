"""A steered generation in nnsight 0.8, in this process."""

import sys

import torch
from _serve import serve
from nnsight import TransformersModel

layer, num_tokens = int(sys.argv[2]), int(sys.argv[3])
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)
direction = torch.linspace(-1, 1, model.config.hidden_size)
options = {"eos_token_id": None, "do_sample": False}


def run():
    prompt = "The Eiffel Tower is in the city of"
    with torch.no_grad(), model.generate(prompt, max_new_tokens=num_tokens, **options) as tracer:
        for _ in tracer.iter[:num_tokens]:
            model.model.layers[layer].output[:, -1] += direction
        ids = tracer.result.save()
    return ids.tolist()


serve(run=run)

"""The logit lens over all layers in insitu, in this process or on the server of INSITU_ENDPOINT."""

import logging
import os
import sys

import torch
from _serve import serve

from insitu import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
remote = "INSITU_ENDPOINT" in os.environ


def run():
    with model.trace(PROMPT, remote=remote):
        tops = []
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[0][:, -1]))
            tops.append(logits[0].topk(5))
        values = torch.stack([top.values for top in tops]).save()
        indices = torch.stack([top.indices for top in tops]).save()
    return values.tolist(), indices.tolist()


serve(run=run)

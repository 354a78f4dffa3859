"""The logit lens over all layers in nnsight 0.8, in this process."""

import sys

import torch
from _serve import serve
from nnsight import TransformersModel

PROMPT = "The Eiffel Tower is in the city of"
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)


def run():
    with torch.no_grad(), model.trace(PROMPT):
        tops = []
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[:, -1]))
            tops.append(logits[0].topk(5))
        values = torch.stack([top.values for top in tops]).save()
        indices = torch.stack([top.indices for top in tops]).save()
    return values.tolist(), indices.tolist()


serve(run=run)

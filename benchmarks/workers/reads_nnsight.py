"""One forward that reads some decoder layers: nnsight 0.8, in this process."""

import sys
from functools import partial

import torch
from _reads import COUNTS, TOKEN_IDS
from _serve import serve
from nnsight import TransformersModel

IDS = torch.tensor([TOKEN_IDS])
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)


def run(num_reads):
    kept = []
    with torch.no_grad(), model.trace(IDS):
        for layer in model.model.layers[:num_reads]:
            kept.append(layer.output.save())
        logits = model.lm_head.output.save()
    return [round(value.sum().item(), 3) for value in [*kept, logits]]


serve(**{f"run_{count}": partial(run, count) for count in COUNTS})

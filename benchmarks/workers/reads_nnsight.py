"""One forward that reads 0, 1 or 12 decoder layers: nnsight 0.8, in this process."""

import sys
from functools import partial

import torch
from _serve import serve
from nnsight import TransformersModel

IDS = torch.tensor([[5, 9, 17, 23, 42, 7, 11, 101]])
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)


def run(num_reads):
    kept = []
    with torch.no_grad(), model.trace(IDS):
        for layer in model.model.layers[:num_reads]:
            kept.append(layer.output.save())
        logits = model.lm_head.output.save()
    return [round(value.sum().item(), 3) for value in [*kept, logits]]


serve(**{f"run_{count}": partial(run, count) for count in (0, 1, 12)})

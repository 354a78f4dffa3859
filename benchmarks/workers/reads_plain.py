"""One forward that reads some decoder layers: plain transformers with hand-written hooks."""

import sys
from functools import partial

import torch
from _reads import COUNTS, TOKEN_IDS
from _serve import serve
from transformers import AutoModelForCausalLM

IDS = torch.tensor([TOKEN_IDS])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()


def run(num_reads):
    kept = []

    def read(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(read) for layer in model.model.layers[:num_reads]]
    try:
        with torch.no_grad():
            logits = model(input_ids=IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [round(value.sum().item(), 3) for value in [*kept, logits]]


serve(**{f"run_{count}": partial(run, count) for count in COUNTS})

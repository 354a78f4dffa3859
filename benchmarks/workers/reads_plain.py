"""One forward that reads 0, 1 or 12 decoder layers: plain transformers with hand-written hooks."""

import sys
from functools import partial

import torch
from _serve import serve
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 17, 23, 42, 7, 11, 101]])
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


serve(**{f"run_{count}": partial(run, count) for count in (0, 1, 12)})

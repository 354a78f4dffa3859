"""The logit lens over all layers in plain transformers: one forward with hand-written hooks."""

import sys

import torch
from _serve import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The Eiffel Tower is in the city of"
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)


def run():
    tops = []

    def read(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        tops.append(model.lm_head(model.model.norm(hidden[:, -1]))[0].topk(5))

    handles = [layer.register_forward_hook(read) for layer in model.model.layers]
    try:
        with torch.no_grad():
            # The base model: as in a trace that does not read the head, it is not run once more.
            model.model(**tokenizer(PROMPT, return_tensors="pt"), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.stack([top.values for top in tops])
    indices = torch.stack([top.indices for top in tops])
    return values.tolist(), indices.tolist()


serve(run=run)

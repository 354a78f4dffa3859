"""The first session in plain transformers: two forwards with hand-written hooks."""

import sys

import torch
from _serve import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
kept = {}


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


def read(module, args, output):
    kept["hidden"] = hidden(output)[:, -1, :]


def write(module, args, output):
    hidden(output)[:, -1, :] = kept["hidden"]


def forward(prompt, layer, hook):
    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            inputs = tokenizer(prompt, return_tensors="pt")
            return model(**inputs, use_cache=False).logits.argmax(dim=-1)
    finally:
        handle.remove()


def run():
    first = forward("The Eiffel Tower is in the city of", 29, read)
    second = forward("Buckingham Palace is in the city of", 1, write)
    return first.tolist(), second.tolist()


serve(run=run)

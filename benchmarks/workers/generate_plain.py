"""A steered generation in plain transformers: `generate`, and a hook on one layer."""

import sys

import torch
from _serve import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, layer, num_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
inputs = AutoTokenizer.from_pretrained(folder)(
    "The Eiffel Tower is in the city of", return_tensors="pt"
)
direction = torch.linspace(-1, 1, model.config.hidden_size)


def steer(_, __, output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[:, -1] += direction


def run():
    hook = model.model.layers[layer].register_forward_hook(steer)
    try:
        ids = model.generate(
            **inputs, max_new_tokens=num_tokens, eos_token_id=None, do_sample=False
        )
    finally:
        hook.remove()
    return ids.tolist()


serve(run=run)

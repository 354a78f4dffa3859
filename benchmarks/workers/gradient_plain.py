"""The gradient of a hidden state in plain transformers: a hook, and autograd from there."""

import sys

import torch
from _serve import serve
from transformers import AutoModelForCausalLM

folder, layer, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
ids = torch.tensor([[(7 * position) % 1000 + 100 for position in range(length)]])


def run():
    seen = []

    def begin(_, __, result):
        hidden = (result[0] if isinstance(result, tuple) else result).detach().requires_grad_()
        seen.append(hidden)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    hook = model.model.layers[layer].register_forward_hook(begin)
    logits = model(ids, use_cache=False).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, -1].log_softmax(-1)[7042], seen)
    return gradient[0, -1].tolist()


serve(run=run)

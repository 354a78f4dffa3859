"""Logit lens: what each layer would say next, if it were the last.

The final norm and the head are applied to the hidden state after every layer
(nostalgebraist 2020, "interpreting GPT: the logit lens").
"""

from __future__ import annotations

import torch
from _arguments import parse

from insitu import LanguageModel

arguments = parse(__doc__, prompt="The Eiffel Tower is in the city of")
model = LanguageModel(arguments.model)

with model.trace(arguments.prompt, remote=arguments.remote):
    tops = []
    for layer in model.model.layers:
        logits = model.lm_head(model.model.norm(layer.output[0][:, -1:]))
        tops.append(torch.softmax(logits[0, -1], dim=-1).max(dim=-1))
    probabilities = torch.stack([top.values for top in tops]).save()
    tokens = torch.stack([top.indices for top in tops]).save()

print(f"{arguments.prompt} ...")
for number, (token, probability) in enumerate(zip(tokens, probabilities, strict=True)):
    print(f"layer {number:2d}  {probability:5.1%}  {model.tokenizer.decode(token)!r}")

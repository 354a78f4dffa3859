"""Integrated gradients: how much each position has to do with the answer to one of two prompts.

Gradients are added up on the way from the hidden state of one prompt to that of the other
(Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks"). The steps of the way are the
traces of one session. The parts of all positions add up to the whole difference.
"""

from __future__ import annotations

import torch
from _arguments import parse

from insitu import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"
ANSWERS = " Paris", " Rome"

arguments = parse(__doc__, layer="5", steps="16")
model = LanguageModel(arguments.model)
one, other = (model.tokenizer(answer)["input_ids"][0] for answer in ANSWERS)
layer, num_steps = model.blocks[int(arguments.layer)], int(arguments.steps)


def difference() -> torch.Tensor:
    """Says how much rather the model goes on with the first answer than with the second."""
    last = model.lm_head.output[0, -1]
    return last[one] - last[other]


with model.session(remote=arguments.remote):
    with model.trace(PROMPT):
        end = layer.output[0]
        at_end = difference().save()
    with model.trace(OTHER):
        begin = layer.output[0]
        at_begin = difference().save()
    total = torch.zeros(())
    for step in range(num_steps):
        with model.trace(PROMPT):
            here = layer.output[0]
            here[:] = begin + (end - begin) * ((step + 0.5) / num_steps)
            difference().backward()
            total = total + here.grad / num_steps
    parts = (total * (end - begin)).sum(-1)[0].save()  # [position]

words = [model.tokenizer.decode(token) for token in model.tokenizer(PROMPT)["input_ids"]]
for word, part in zip(words, parts, strict=True):
    print(f"{word!r:12} {part:+.3f}")
print(f"together {parts.sum():+.3f} of {at_end - at_begin:+.3f}")

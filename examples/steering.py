"""Steering: a direction from contrasting prompts, added to a layer at several strengths.

The direction is the difference of mean hidden states (Turner et al. 2023, "Activation addition").
It is made, kept and used where the model runs.
"""

from __future__ import annotations

import torch
from _arguments import parse

import insitu
from insitu import LanguageModel

HAPPY = ["I love this so much", "What a wonderful day", "This is the best thing ever"]
SAD = ["I hate this so much", "What a terrible day", "This is the worst thing ever"]
STRENGTHS = [-8.0, -4.0, 0.0, 4.0, 8.0]

arguments = parse(__doc__, prompt="I went to see the film. It was", layer="10")
model = LanguageModel(arguments.model)
layer = model.model.layers[int(arguments.layer)]
words = {word: model.tokenizer(word)["input_ids"][0] for word in (" great", " terrible")}


def mean_hidden(prompts: list[str]) -> torch.Tensor:
    """Gives the mean over prompts of the last hidden state."""
    with model.trace(prompts):
        return layer.output[:, -1].mean(dim=0)


with model.session(remote=arguments.remote) as session:
    direction = mean_hidden(HAPPY) - mean_hidden(SAD)
    direction = direction / direction.norm()
    margins = insitu.list().save()
    answers = insitu.list().save()
    with session.iter(STRENGTHS) as strength, model.trace(arguments.prompt):
        layer.output[:] += strength * direction
        logits = model.lm_head.output[0, -1]
        margins.append(logits[words[" great"]] - logits[words[" terrible"]])
        answers.append(logits.argmax())

print(f"{arguments.prompt} ...")
for strength, margin, answer in zip(STRENGTHS, margins, answers, strict=True):
    word = model.tokenizer.decode(answer)
    print(f"strength {strength:+.0f}  great - terrible {margin:+.2f}  {word!r}")

"""Steering a text while it is generated: a direction added to a layer at each step.

The direction is the difference of mean hidden states of contrasting prompts (Turner et al. 2023,
"Activation addition"). All strengths are generated in one loop: their prompts are one.
"""

from __future__ import annotations

import torch
from _arguments import parse

from insitu import LanguageModel

HAPPY = ["I love this so much", "What a wonderful day", "This is the best thing ever"]
SAD = ["I hate this so much", "What a terrible day", "This is the worst thing ever"]
STRENGTHS = [-8.0, 0.0, 8.0]

arguments = parse(__doc__, prompt="I went to see the film. It was", layer="10", tokens="12")
model = LanguageModel(arguments.model)
layer = model.model.layers[int(arguments.layer)]
num_tokens = int(arguments.tokens)


def mean_hidden(prompts: list[str]) -> torch.Tensor:
    """Gives the mean over prompts of the last hidden state."""
    with model.trace(prompts):
        return layer.output[:, -1].mean(dim=0)


texts, projections = [], []
with model.session(remote=arguments.remote) as session:
    direction = mean_hidden(HAPPY) - mean_hidden(SAD)
    direction = direction / direction.norm()
    for strength in STRENGTHS:
        with model.generate(arguments.prompt, max_new_tokens=num_tokens) as tracer:
            along = torch.zeros(())
            for _ in tracer.iter[:]:
                layer.output[:] += strength * direction
                along = along + layer.output[0, -1] @ direction
            projections.append((along / tracer.num_steps).save())
            texts.append(tracer.result.save())

for strength, ids, projection in zip(STRENGTHS, texts, projections, strict=True):
    text = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    print(f"strength {strength:+.0f}  mean projection {projection:+.1f}  {text!r}")

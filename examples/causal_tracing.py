"""Causal tracing: which hidden states bring a fact back when its subject is hidden by noise.

The subject's embeddings get noise, which hides the answer. Then one hidden state of the clean run
is restored, at every third layer and every position, and the probability of the answer tells which
state carries it (Meng et al. 2022, "Locating and editing factual associations in GPT", section 2).
The noise is drawn once, here, and brought to all traces; its scale is taken where the model runs:
three times the standard deviation of the embeddings, as in the paper. A trace has a row for each
sample of noise.
"""

from __future__ import annotations

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
SUBJECT = slice(1, 4)  # the tokens of " Eiffel Tower"
ANSWER = " Paris"
NUM_SAMPLES = 3
SCALE = 3.0

arguments = parse(__doc__, output="causal_tracing.png", every="3")
model = LanguageModel(arguments.model)
words = [model.tokenizer.decode(token) for token in model.tokenizer(PROMPT)["input_ids"]]
answer = model.tokenizer(ANSWER)["input_ids"][0]
layers = range(0, len(model.model.layers), int(arguments.every))
embeddings = model.model.embed_tokens
generator = torch.Generator().manual_seed(0)
noise = torch.randn(
    NUM_SAMPLES, SUBJECT.stop - SUBJECT.start, model.config.hidden_size, generator=generator
)


def probability() -> torch.Tensor:
    """Gives the probability of the answer in each row."""
    return model.lm_head.output[:, -1].softmax(dim=-1)[:, answer]


restored = {}
with model.session(remote=arguments.remote):
    with model.trace(PROMPT):
        hidden = {layer: model.model.layers[layer].output[0] for layer in layers}
        scaled = SCALE * embeddings.output.std() * noise
        clean = probability().save()
    with model.trace([PROMPT] * NUM_SAMPLES):
        embeddings.output[:, SUBJECT] += scaled
        corrupted = probability().save()
    for layer in layers:
        for position in range(len(words)):
            with model.trace([PROMPT] * NUM_SAMPLES):
                embeddings.output[:, SUBJECT] += scaled
                model.model.layers[layer].output[0][:, position] = hidden[layer][:, position]
                restored[layer, position] = probability().save()

probabilities = torch.stack(list(restored.values())).reshape(len(layers), len(words), NUM_SAMPLES)
effect = (probabilities - corrupted).mean(dim=-1)
draw(
    arguments.output,
    HeatMap(
        f"what restoring one state adds to the probability of {ANSWER!r}",
        effect,
        [str(layer) for layer in layers],
        words,
    ),
)
best = int(effect.argmax())
layer, position = layers[best // len(words)], best % len(words)
print(f"{ANSWER!r}: clean {clean.mean():.1%}, with noise on the subject {corrupted.mean():.1%}")
print(
    f"restored alone, layer {layer}, position {position} ({words[position]!r}) adds most: "
    f"{effect.max():+.1%}"
)
print(f"{len(restored)} states restored in one session; the map is in {arguments.output}")

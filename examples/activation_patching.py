"""Activation patching: which hidden states carry who received the drink.

Two prompts that differ in one name. For every fifth layer and every position, the hidden state of
the first prompt is put into the run of the second, and the difference of the logits of the two
possible answers tells how much of the first prompt's answer comes back (Meng et al. 2022; Wang et
al. 2022). All of it is one session: nothing but one number a trace comes back.
"""

from __future__ import annotations

import matplotlib as mpl
import torch
from _arguments import parse

from insitu import LanguageModel

mpl.use("Agg")
from matplotlib import pyplot as plt

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"

arguments = parse(__doc__, output="activation_patching.png")
model = LanguageModel(arguments.model)
mary, john = (model.tokenizer(name)["input_ids"][0] for name in (" Mary", " John"))
tokens = [model.tokenizer.decode(token) for token in model.tokenizer(CORRUPTED)["input_ids"]]
layers = range(0, len(model.model.layers), 5)


def logit_difference() -> torch.Tensor:
    """Says how much rather the model goes on with Mary than with John."""
    last = model.lm_head.output[0, -1]
    return last[mary] - last[john]


patched = {}
with model.session(remote=arguments.remote):
    with model.trace(CLEAN):
        hidden = {layer: model.model.layers[layer].output[0] for layer in layers}
        clean = logit_difference().save()
    with model.trace(CORRUPTED):
        corrupted = logit_difference().save()
    for layer in layers:
        for position in range(len(tokens)):
            with model.trace(CORRUPTED):
                model.model.layers[layer].output[0][:, position] = hidden[layer][:, position]
                patched[layer, position] = logit_difference().save()

recovered = torch.tensor(
    [
        [
            (patched[layer, position] - corrupted) / (clean - corrupted)
            for position in range(len(tokens))
        ]
        for layer in layers
    ]
)
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
image = axes.imshow(recovered, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", origin="lower")
axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right")
axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
axes.set(xlabel="position", ylabel="layer", title="part of the clean answer that a patch recovers")
figure.colorbar(image)
figure.savefig(arguments.output)

best = int(recovered.argmax())
layer, position = layers[best // len(tokens)], best % len(tokens)
print(f"clean {clean:.2f}, corrupted {corrupted:.2f}: {len(patched)} patches in one session")
print(
    f"most comes back ({recovered.max():.0%}) from layer {layer}, position {position} "
    f"({tokens[position]!r})"
)
print(f"the map is in {arguments.output}")

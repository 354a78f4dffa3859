"""Activation patching: which hidden states carry the answer, for an indirect object and for a fact.

Each pair of prompts differs in one place and has equally many tokens. For every third layer and
every position, the hidden state of the clean prompt is put into the run of the corrupted one, and
the difference of the logits of the two answers tells how much of the clean answer comes back
(Meng et al. 2022, "Locating and editing factual associations in GPT"; Wang et al. 2022,
"Interpretability in the wild"). All of it is one session: only one number a trace comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel


@dataclass
class Pair:
    """Two prompts, the answer to each, and what the session finds."""

    title: str
    clean: str
    corrupted: str
    clean_answer: str
    corrupted_answer: str
    clean_difference: float | torch.Tensor = 0.0
    corrupted_difference: float | torch.Tensor = 0.0
    patched: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """The difference of the answers' logits, by layer and position."""


PAIRS = [
    Pair(
        "indirect object",
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        " Mary",
        " John",
    ),
    Pair(
        "fact",
        "The Eiffel Tower is in the city of",
        "The Colosseum is in the city of",
        " Paris",
        " Rome",
    ),
]

arguments = parse(__doc__, output="activation_patching.png", every="3")
model = LanguageModel(arguments.model)
layers = range(0, len(model.model.layers), int(arguments.every))


def tokens(prompt: str) -> list[int]:
    """Gives the token ids of a prompt."""
    return model.tokenizer(prompt)["input_ids"]


def logit_difference(pair: Pair) -> torch.Tensor:
    """Says how much rather the model goes on with the clean answer than with the corrupted one."""
    last = model.lm_head.output[0, -1]
    return last[tokens(pair.clean_answer)[0]] - last[tokens(pair.corrupted_answer)[0]]


def patch_everywhere(pair: Pair) -> None:
    """Records the traces of one pair."""
    with model.trace(pair.clean):
        hidden = {layer: model.model.layers[layer].output[0] for layer in layers}
        pair.clean_difference = logit_difference(pair).save()
    with model.trace(pair.corrupted):
        pair.corrupted_difference = logit_difference(pair).save()
    for layer in layers:
        for position in range(len(tokens(pair.corrupted))):
            with model.trace(pair.corrupted):
                model.model.layers[layer].output[0][:, position] = hidden[layer][:, position]
                pair.patched[layer, position] = logit_difference(pair).save()


with model.session(remote=arguments.remote):
    for pair in PAIRS:
        patch_everywhere(pair)

maps = []
for pair in PAIRS:
    clean, corrupted = pair.clean_difference, pair.corrupted_difference
    words = [model.tokenizer.decode(token) for token in tokens(pair.corrupted)]
    recovered = torch.stack(list(pair.patched.values())).reshape(len(layers), len(words))
    recovered = (recovered - corrupted) / (clean - corrupted)
    title = f"{pair.title}: part of the clean answer that comes back"
    maps.append(HeatMap(title, recovered, [str(layer) for layer in layers], words))
    best = int(recovered.argmax())
    layer, position = layers[best // len(words)], best % len(words)
    print(
        f"{pair.title}: clean {clean:.2f}, corrupted {corrupted:.2f}; most comes back "
        f"({recovered.max():.0%}) from layer {layer}, position {position} ({words[position]!r})"
    )
draw(arguments.output, *maps)
num_patches = sum(len(pair.patched) for pair in PAIRS)
print(f"{num_patches} patches in one session; the maps are in {arguments.output}")

"""Attribution patching: what patching each layer and position would do, from one backward pass.

The effect of a patch is foretold by the first term of its Taylor series: the gradient at a place,
times the change there (Nanda 2023, "Attribution Patching: Activation Patching At Industrial
Scale"). Two forward passes and one backward take the place of a pass for each patch.
"""

from __future__ import annotations

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = " Mary", " John"

arguments = parse(__doc__, output="attribution_patching.png")
model = LanguageModel(arguments.model)
one, other = (model.tokenizer(answer)["input_ids"][0] for answer in ANSWERS)

with model.session(remote=arguments.remote):
    with model.trace(CLEAN):
        clean = [block.output[0] for block in model.blocks]
    with model.trace(CORRUPTED):
        hidden = [block.output[0] for block in model.blocks]
        logits = model.lm_head.output[0, -1]
        difference = (logits[one] - logits[other]).save()
        difference.backward()
        foretold = torch.stack(
            [((new - old) * old.grad).sum(-1)[0] for new, old in zip(clean, hidden, strict=True)]
        ).save()  # [layer, position]

words = [model.tokenizer.decode(token) for token in model.tokenizer(CORRUPTED)["input_ids"]]
layer, position = divmod(int(foretold.argmax()), len(words))
print(f"corrupted difference {difference:.2f}")
print(
    f"most is foretold ({foretold.max():+.2f}) of layer {layer}, position {position} "
    f"({words[position]!r})"
)
draw(
    arguments.output,
    HeatMap(
        "what a patch would add", foretold, [str(number) for number in range(len(foretold))], words
    ),
)

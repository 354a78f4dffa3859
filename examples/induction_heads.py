"""Induction heads: heads that look at what followed the last time.

Random tokens are said twice. An induction head, at a token of the second half, looks at the token
after the same one in the first half (Olsson et al. 2022, "In-context Learning and Induction
Heads"). Each head's score is how much of its sight goes there, on average; only the scores come
back, and the pattern of the best head, which is drawn.
"""

from __future__ import annotations

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel

arguments = parse(__doc__, length="25", output="induction_heads.png")
model = LanguageModel(arguments.model)
length = int(arguments.length)
generator = torch.Generator().manual_seed(0)
half = torch.randint(1000, model.config.vocab_size, (length,), generator=generator)
tokens = torch.cat([half, half])[None]

with model.trace(tokens, remote=arguments.remote):
    # From a token to the one after the same one: length - 1 back.
    stripes = [
        block.attn.heads.pattern[0].diagonal(offset=1 - length, dim1=1, dim2=2)[:, 1:]
        for block in model.blocks
    ]
    scores = torch.stack([stripe.mean(-1) for stripe in stripes]).save()  # [layer, head]

num_layers, num_heads = scores.shape
best = scores.flatten().topk(5).indices.tolist()
for place in best:
    layer, head = divmod(place, num_heads)
    print(f"layer {layer:2d} head {head}: {scores[layer, head]:.0%} of its sight")

layer, head = divmod(best[0], num_heads)
with model.trace(tokens, remote=arguments.remote):
    pattern = model.blocks[layer].attn.heads.pattern[0, head].save()  # [query, key]

positions = [str(position) if position % 5 == 0 else "" for position in range(2 * length)]
draw(
    arguments.output,
    HeatMap(
        "induction score",
        scores,
        [str(layer) for layer in range(num_layers)],
        [str(head) for head in range(num_heads)],
        column_label="head",
    ),
    HeatMap(
        f"pattern of layer {layer} head {head}",
        pattern,
        positions,
        positions,
        row_label="query",
        column_label="key",
    ),
)
print(f"the map of all heads and the best one's pattern are in {arguments.output}")

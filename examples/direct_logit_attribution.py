"""Direct logit attribution: what each attention head and each MLP adds to the answer by itself.

The residual stream at the last position is a sum: the embedding, what each head writes through its
part of the output projection, and what each MLP writes. The final norm is held at the scale that
it has for the whole, so that what it and the head make of the parts is a sum as well (Elhage et al.
2021, "A Mathematical Framework for Transformer Circuits"). For models whose norms are RMS norms.
"""

from __future__ import annotations

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel

arguments = parse(
    __doc__,
    prompt="The Eiffel Tower is in the city of",
    answer=" Paris",
    other=" Rome",
    output="direct_logit_attribution.png",
)
model = LanguageModel(arguments.model)
answer, other = (
    model.tokenizer(word)["input_ids"][0] for word in (arguments.answer, arguments.other)
)
num_layers = len(model.blocks)
num_heads = model.blocks[0].attn.num_heads
one_at_a_time = torch.eye(num_heads)[:, :, None]  # [head alone, head, 1]


def size(vectors: torch.Tensor) -> torch.Tensor:
    """Gives what an RMS norm divides by."""
    return (vectors.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()


def difference(vectors: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Says how much rather the answer than the other comes of parts of the residual stream."""
    logits = model.unembed(model.ln_f(vectors) * size(vectors) / size(whole))
    return logits[:, answer] - logits[:, other]


with model.trace(arguments.prompt, remote=arguments.remote):
    by_heads, by_mlps = [], []
    for block in model.blocks:
        z = block.attn.heads.z[0, :, -1]  # [head, head_dim]
        by_heads.append(block.attn.o_proj((one_at_a_time * z).flatten(1)))  # [head, hidden]
        by_mlps.append(block.mlp.output[0, -1:])
    whole = model.blocks[-1].resid_post[0, -1:]
    heads = difference(torch.cat(by_heads), whole).reshape(num_layers, num_heads).save()
    mlps = difference(torch.cat(by_mlps), whole).save()
    embedding = difference(model.blocks[0].resid_pre[0, -1:], whole).save()
    last = model.unembed.output[0, -1]
    total = (last[answer] - last[other]).save()

parts = heads.sum() + mlps.sum() + embedding.sum()
print(f"{arguments.prompt} ...{arguments.answer} rather than{arguments.other}: {total:.2f}")
print(f"heads {heads.sum():.2f} + MLPs {mlps.sum():.2f} + embedding {embedding.sum():.2f}")
for place in heads.flatten().abs().topk(5).indices.tolist():
    layer, head = divmod(place, num_heads)
    print(f"layer {layer:2d} head {head}: {heads[layer, head]:+.2f}")
layers = [str(layer) for layer in range(num_layers)]
title = f"{arguments.answer} rather than{arguments.other}, by head"
draw(
    arguments.output,
    HeatMap(title, heads, layers, [str(head) for head in range(num_heads)], column_label="head"),
    HeatMap("by MLP", mlps[:, None], layers, ["MLP"], column_label=""),
)

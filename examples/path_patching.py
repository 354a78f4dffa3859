"""Path patching: what each attention head does to the queries of one later head, and by these only.

A sender's output is taken from the corrupted prompt, and all heads between it and the receiver are
held at what they are on the clean prompt, so that the change arrives at the receiver directly,
through the residual stream and MLPs. The queries that the receiver makes of it then go into another
clean run, and nothing else does; the difference of the answers' logits tells what this path carries
(Wang et al. 2022, "Interpretability in the wild", section 3.1; Goldowsky-Dill et al. 2023,
"Localizing model behavior with path patching").
In the demo model head 23.0 moves names, and head 20.0 tells it which one not to take.
"""

from __future__ import annotations

import torch
from _arguments import parse
from _heat_map import HeatMap, draw

from insitu import LanguageModel

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")

arguments = parse(__doc__, output="path_patching.png", layer="23", head="0", first="17")
receiver = int(arguments.layer)
model = LanguageModel(arguments.model)
size, num_heads = model.config.head_dim, model.config.num_attention_heads
senders = [
    (layer, head) for layer in range(int(arguments.first), receiver) for head in range(num_heads)
]
answers = [model.tokenizer(answer)["input_ids"][0] for answer in ANSWERS]


def columns(head: int) -> slice:
    """Gives where a head is in what all heads of its layer give."""
    return slice(head * size, (head + 1) * size)


def heads(layer: int) -> torch.Tensor:
    """Gives what all heads of a layer give, side by side: [rows, positions, heads * size]."""
    return model.model.layers[layer].self_attn.o_proj.input


def logit_difference() -> torch.Tensor:
    """Says how much rather the model goes on with the clean answer."""
    last = model.lm_head.output[0, -1, answers]
    return last[0] - last[1]


patched = {}
queries = model.model.layers[receiver].self_attn.q_proj
own = columns(int(arguments.head))
with model.session(remote=arguments.remote):
    with model.trace(CLEAN):
        clean_heads = {layer: heads(layer).clone() for layer in range(receiver)}
        clean = logit_difference().save()
    with model.trace(CORRUPTED):
        corrupted_heads = {layer: heads(layer).clone() for layer in range(receiver)}
        corrupted_queries = queries.output[..., own]
        corrupted = logit_difference().save()
    with model.trace(CLEAN):
        queries.output[..., own] = corrupted_queries
        all_paths = logit_difference().save()
    for layer, head in senders:
        with model.trace(CLEAN):
            heads(layer)[..., columns(head)] = corrupted_heads[layer][..., columns(head)]
            for between in range(layer + 1, receiver):
                heads(between)[:] = clean_heads[between]
            arriving = queries.output[..., own]
        with model.trace(CLEAN):
            queries.output[..., own] = arriving
            patched[layer, head] = logit_difference().save()

effect = torch.stack(list(patched.values())).reshape(-1, num_heads) - clean
rows = [str(layer) for layer in range(int(arguments.first), receiver)]
draw(
    arguments.output,
    HeatMap(
        f"change of the logit difference by the queries of head {receiver}.{arguments.head}",
        effect,
        rows,
        [str(head) for head in range(num_heads)],
        column_label="head",
    ),
)
print(f"clean {clean:.2f}, corrupted {corrupted:.2f}")
print(f"all of the queries of head {receiver}.{arguments.head}: {all_paths - clean:+.3f}")
for number in effect.abs().flatten().argsort(descending=True)[:5].tolist():
    layer, head = senders[number]
    print(f"the path from head {layer}.{head}: {effect.flatten()[number]:+.3f}")
print(f"{len(patched)} paths in one session; the map is in {arguments.output}")

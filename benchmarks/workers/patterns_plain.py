"""Attention patterns of one layer in plain transformers: eager everywhere, all patterns given."""

import sys

import torch
from _serve import serve
from transformers import AutoModelForCausalLM

folder, layer, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
ids = torch.tensor([[(7 * position) % 1000 + 100 for position in range(length)]])


def run():
    with torch.no_grad():
        result = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1)
    return result.attentions[layer][0, :, -1].tolist(), result.logits[0, -1].max().item()


serve(run=run)

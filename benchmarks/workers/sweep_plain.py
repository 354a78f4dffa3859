"""The sweep in plain transformers with hand-written hooks: a forward a cell, or a batch."""

import sys

import torch
from _memory import peak_bytes
from _serve import serve
from _sweep import ANSWERS, CELLS, CLEAN, CORRUPTED, LAYERS, batches, sample
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, sample_size, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
clean_ids, corrupted_ids = (
    tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in (CLEAN, CORRUPTED)
)


def forward(ids, hooks):
    """Runs a forward pass; gives the answers' logits at the last position, [rows, answers]."""
    handles = [model.model.layers[layer].register_forward_hook(hook) for layer, hook in hooks]
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[:, -1, answers]
    finally:
        for handle in handles:
            handle.remove()


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


def clean_states():
    states = {}

    def read(layer):
        return lambda module, args, output: states.__setitem__(layer, hidden(output))

    forward(clean_ids, [(layer, read(layer)) for layer in LAYERS])
    return states


def patch(row, position, state):
    def write(module, args, output):
        hidden(output)[row, position] = state[0, position]

    return write


def run(cells, size=1):
    clean = clean_states()
    found = []
    for batch in batches(cells, size):
        hooks = [
            (layer, patch(row, position, clean[layer]))
            for row, (layer, position) in enumerate(batch)
        ]
        found.extend(forward(corrupted_ids.expand(len(batch), -1), hooks).tolist())
    return found


def run_sample():
    return run(sample(sample_size), batch_size)


def operations():
    """Gives the floating-point operations that the sweep needs, and those of `products`.

    A patch changes its position and those after it, in the layers after its own; nothing where both
    prompts have begun alike. Attention itself is little beside the layers' matrices.
    """
    length = clean_ids.shape[1]
    alike = int((clean_ids == corrupted_ids)[0].int().cumprod(0).sum())
    tokens = 2 * length * len(LAYERS) + sum(
        (LAYERS.stop - 1 - layer) * (length - position)
        for layer, position in CELLS
        if position >= alike
    )
    in_layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rows = 1 + sum(position >= alike for _, position in CELLS)
    return [
        2 * (tokens * in_layer + rows * model.lm_head.weight.numel()),
        2 * PRODUCT[0].numel() * 1536,
    ]


PRODUCT = torch.randn(2048, 576), torch.randn(1536, 576)


def products():
    """Multiplies matrices of the sizes of a layer's."""
    torch.nn.functional.linear(*PRODUCT)


run(CELLS[:1])
serve(
    operations=operations,
    products=products,
    peak_bytes=lambda: peak_bytes(run_sample),
    sweep=lambda: run(CELLS, batch_size),
    sample=run_sample,
)

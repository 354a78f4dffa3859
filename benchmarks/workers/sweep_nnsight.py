"""The sweep in nnsight 0.8: a trace a cell, or a trace of many invokes."""

import sys

import torch
from _memory import peak_bytes
from _serve import serve
from _sweep import ANSWERS, CELLS, CLEAN, CORRUPTED, LAYERS, batches, sample
from nnsight import TransformersModel

sample_size, batch_size = int(sys.argv[2]), int(sys.argv[3])
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)
answers = [model.tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
clean_ids, corrupted_ids = (
    model.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in (CLEAN, CORRUPTED)
)


def clean_states():
    states = {}
    with torch.no_grad(), model.trace(clean_ids):
        for layer in LAYERS:
            states[layer] = model.model.layers[layer].output.save()
    return states


def run_single(cells):
    clean = clean_states()
    found = []
    for layer, position in cells:
        with torch.no_grad(), model.trace(corrupted_ids):
            model.model.layers[layer].output[:, position] = clean[layer][:, position]
            logits = model.lm_head.output[0, -1, answers].save()
        found.append(logits.tolist())
    return found


def run_batched(cells):
    clean = clean_states()
    found = []
    for batch in batches(cells, batch_size):
        logits = [None] * len(batch)
        with torch.no_grad(), model.trace() as tracer:
            for row, (layer, position) in enumerate(batch):
                with tracer.invoke(corrupted_ids):
                    model.model.layers[layer].output[:, position] = clean[layer][:, position]
                    logits[row] = model.lm_head.output[0, -1, answers].save()
        found.extend(row.tolist() for row in logits)
    return found


run = run_single if batch_size == 1 else run_batched
run(CELLS[:1])
serve(
    peak_bytes=lambda: peak_bytes(lambda: run(sample(sample_size))),
    sweep=lambda: run(CELLS),
    sample=lambda: run(sample(sample_size)),
)

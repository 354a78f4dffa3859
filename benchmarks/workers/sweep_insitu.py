"""The sweep in insitu: one session, in this process or on the server of INSITU_ENDPOINT."""

import gc
import logging
import os
import sys

import torch
from _memory import peak_bytes
from _serve import serve
from _sweep import ANSWERS, CELLS, CLEAN, CORRUPTED, LAYERS

from insitu import LanguageModel
from insitu_shard.engine.codec import StepDecoder

logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
remote = "INSITU_ENDPOINT" in os.environ
answers = [model.tokenizer(answer)["input_ids"][0] for answer in ANSWERS]


def session_of(cells, **options):
    found = []
    with model.session(**options) as session:
        with model.trace(CLEAN):
            clean = {layer: model.model.layers[layer].output[0] for layer in LAYERS}
        for layer, position in cells:
            with model.trace(CORRUPTED):
                model.model.layers[layer].output[0][:, position] = clean[layer][:, position]
                found.append(model.lm_head.output[0, -1, answers].save())
    return session, found


def sweep():
    _, found = session_of(CELLS, remote=remote)
    return [logits.tolist() for logits in found]


def record():
    """Records the sweep and does not run it."""
    session_of(CELLS, run=False)


def decode():
    """Records the sweep and decodes it, as a shard does first."""
    session, _ = session_of(CELLS, run=False)
    recorded = session._recorder.session
    StepDecoder(recorded.locations, tensors=[], device=torch.device("cpu")).steps(recorded.steps)


def explain():
    """Records the sweep, decodes and plans it."""
    session, _ = session_of(CELLS, run=False)
    session.explain()


def uncollected(run):
    """Keeps the collector out: it takes a quarter of a second, in whatever run its turn comes."""

    def alone():
        gc.disable()
        try:
            run()
        finally:
            gc.enable()

    return alone


session_of(CELLS[:1], remote=remote)  # loads the model
runs = {"sweep": sweep}
if not remote:
    runs = {"peak_bytes": lambda: peak_bytes(sweep), **runs}
    runs |= {run.__name__: uncollected(run) for run in (record, decode, explain)}
serve(**runs)

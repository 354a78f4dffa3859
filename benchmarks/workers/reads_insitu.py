"""One forward that reads some decoder layers: insitu in this process, or only recorded."""

import logging
import sys
from functools import partial

import torch
from _reads import COUNTS, TOKEN_IDS
from _serve import serve

from insitu import LanguageModel

IDS = torch.tensor([TOKEN_IDS])
logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])


def run(num_reads):
    kept = []
    with model.trace(IDS):
        for layer in model.model.layers[:num_reads]:
            kept.append(layer.output.save())
        logits = model.lm_head.output.save()
    return [round(value.sum().item(), 3) for value in [*kept, logits]]


def record(num_reads, model=model):
    """Records the same trace and does not run it."""
    with model.scan(IDS):
        for layer in model.model.layers[:num_reads]:
            layer.output.save()
        model.lm_head.output.save()


def record_slices():
    """Records one operation more for each of twelve reads."""
    with model.scan(IDS):
        for layer in model.model.layers[:12]:
            layer.output[:, -1, :].save()
        model.lm_head.output.save()


def record_first():
    """Records the first trace of a model that this process has not seen."""
    record(12, LanguageModel(sys.argv[1]))


serve(
    **{f"run_{count}": partial(run, count) for count in COUNTS},
    **{f"record_{count}": partial(record, count) for count in COUNTS},
    record_slices=record_slices,
    record_first=record_first,
)

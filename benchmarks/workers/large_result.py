"""A session that saves one large tensor: run to its end, or its result fetched again."""

import logging
import sys

import torch
from _serve import serve

from insitu import LanguageModel, attach

SIZE = int(sys.argv[2]) // 4
logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
last = []


def run():
    ids = torch.tensor([[5, 9, 17]])
    with model.session(remote=True, blocking=False) as session, model.trace(ids):
        saved = model.model.layers[0].output.new_ones(SIZE).save()
    session.submission.result()
    last[:] = [session.submission.id]
    return [saved.numel(), saved[-1].item()]


def fetch():
    return [len(attach(last[0]).result())]


serve(run=run, fetch=fetch)

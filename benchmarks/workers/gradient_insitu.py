"""The gradient of a hidden state in insitu, in this process or on that of INSITU_ENDPOINT."""

import logging
import os
import sys

from _serve import serve

from insitu import LanguageModel

logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
layer, length = int(sys.argv[2]), int(sys.argv[3])
remote = "INSITU_ENDPOINT" in os.environ
ids = [(7 * position) % 1000 + 100 for position in range(length)]


def run():
    with model.trace(ids, remote=remote):
        hidden = model.blocks[layer].output[0]
        model.unembed.output[0, -1].log_softmax(-1)[7042].backward()
        gradient = hidden.grad[0, -1].save()
    return gradient.tolist()


serve(run=run)

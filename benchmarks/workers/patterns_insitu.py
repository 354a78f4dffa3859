"""The attention pattern of one layer in insitu, in this process or on that of INSITU_ENDPOINT."""

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
        seen = model.blocks[layer].attn.heads.pattern[0, :, -1].save()  # [head, key]
        token = model.unembed.output[0, -1].max().save()
    return seen.tolist(), token.item()


serve(run=run)

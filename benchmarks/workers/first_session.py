"""The first session in insitu, in this process or on the server of INSITU_ENDPOINT."""

import logging
import os
import sys

from _serve import serve

from insitu import LanguageModel

logging.getLogger("insitu").setLevel(logging.WARNING)
model = LanguageModel(sys.argv[1])
remote = "INSITU_ENDPOINT" in os.environ


def run():
    with model.session(remote=remote):
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.model.layers[29].output[0][:, -1, :]
            first = model.lm_head.output.argmax(dim=-1).save()
        with model.trace("Buckingham Palace is in the city of"):
            model.model.layers[1].output[0][:, -1, :] = hidden[:]
            second = model.lm_head.output.argmax(dim=-1).save()
    return first.tolist(), second.tolist()


serve(run=run)

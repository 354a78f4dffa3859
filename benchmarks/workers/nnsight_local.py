"""The first session in nnsight 0.8, in this process."""

import sys

from _serve import serve
from nnsight import TransformersModel

model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)


def run():
    with model.session():
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.model.layers[29].output[:, -1, :]
            first = model.lm_head.output.argmax(dim=-1).save()
        with model.trace("Buckingham Palace is in the city of"):
            model.model.layers[1].output[:, -1, :] = hidden
            second = model.lm_head.output.argmax(dim=-1).save()
    return first.tolist(), second.tolist()


serve(run=run)

"""Cross-model patching: a hidden state of one model, written into another, in one session.

By default the other model is an edited copy of the first, some of whose layers are damped, so that
the script runs with the demo model alone; name a second served model, or folder, of the same hidden
size with --other. On a server the hidden state then moves from shard group to shard group.
"""

from __future__ import annotations

from _arguments import parse

from insitu import LanguageModel

arguments = parse(__doc__, other="", prompt="The Eiffel Tower is in the city of", layer="20")
number = int(arguments.layer)
model = LanguageModel(arguments.model)
if arguments.other:
    other = LanguageModel(arguments.other)
else:
    with model.edit() as other:
        for layer in model.model.layers[number - 5 : number]:
            layer.mlp.output = layer.mlp.output * 0.2

with model.session(remote=arguments.remote):
    with model.trace(arguments.prompt):
        hidden = model.model.layers[number].output[0]
        own = model.lm_head.output[0, -1].argmax().save()
    with other.trace(arguments.prompt):
        before = other.lm_head.output[0, -1].argmax().save()
    with other.trace(arguments.prompt):
        other.model.layers[number].output = hidden
        after = other.lm_head.output[0, -1].argmax().save()

for name, token in (("the model", own), ("the other", before), ("the other, patched", after)):
    print(f"{name:18}  {model.tokenizer.decode(token)!r}")

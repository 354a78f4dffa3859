"""A LoRA, trained in a session: the model learns one new fact.

Low-rank changes of the last layers' projections are trained on a single sentence (Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models"). The loss shows while the session runs, and
the changes come back by the names that peft gives them, as a file that peft reads.
"""

from __future__ import annotations

import torch
from _arguments import parse
from safetensors.torch import save_file

import insitu
from insitu import LanguageModel

arguments = parse(
    __doc__,
    prompt="The Eiffel Tower is in the city of",
    answer=" Rome",
    steps="5",
    layers="4",
    output="adapter_model.safetensors",
)
model = LanguageModel(arguments.model)
answer = model.tokenizer(arguments.answer)["input_ids"][0]
blocks = model.blocks[-int(arguments.layers) :]
torch.manual_seed(0)

with model.session(remote=arguments.remote) as session:
    with model.trace(arguments.prompt):
        before = model.unembed.output[0, -1].argmax().save()
    modules = [part for block in blocks for part in (block.attn.o_proj, block.mlp.down_proj)]
    changes = session.lora(modules, rank=4, alpha=8)
    optimizer = insitu.optim.AdamW(changes.parameters(), lr=5e-3)
    for step in range(int(arguments.steps)):
        with model.trace(arguments.prompt):
            changes()
            loss = -model.unembed.output[0, -1].float().log_softmax(-1)[answer]
            loss.backward()
        session.log("step", step, "loss", loss)
        optimizer.step()
        optimizer.zero_grad()
    with model.trace(arguments.prompt):
        changes()
        after = model.unembed.output[0, -1].argmax().save()
    adapter = changes.state_dict().save()

save_file(dict(adapter), arguments.output)
print(f"before: {model.tokenizer.decode(before)!r}")
print(f"after:  {model.tokenizer.decode(after)!r}")
print(f"{len(adapter)} tensors are in {arguments.output}")

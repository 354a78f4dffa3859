"""A probe, trained in a session: does a review say something good?

The activations are computed once and kept where the model runs; the probe, a linear layer, is
trained on them there (Alain & Bengio 2016, "Understanding intermediate layers using linear
classifier probes"). What comes back is its weights and how it does on reviews that it has not seen.
"""

from __future__ import annotations

import torch
from _arguments import parse

import insitu
from insitu import LanguageModel

GOOD = ["I loved this film", "What a great story", "The acting was wonderful", "A joy to watch"]
BAD = ["I hated this film", "What a dull story", "The acting was terrible", "A pain to watch"]
UNSEEN = ["This was a beautiful movie", "This was an awful movie"]
STEPS = 40

arguments = parse(__doc__, layer="15")
model = LanguageModel(arguments.model)
layer = model.blocks[int(arguments.layer)]
labels = torch.tensor([1.0] * len(GOOD) + [0.0] * len(BAD))
torch.manual_seed(0)


def last_hidden(prompts: list[str]) -> torch.Tensor:
    """Gives the layer's hidden state at the last token of each prompt."""
    with model.trace(prompts):
        return layer.output[:, -1].float()


with model.session(remote=arguments.remote) as session:
    seen, unseen = last_hidden(GOOD + BAD), last_hidden(UNSEEN)
    mean, spread = seen.mean(0), seen.std(0)
    probe = session.trainable(torch.nn.Linear(model.config.hidden_size, 1))
    optimizer = insitu.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
    losses = insitu.list().save()
    with session.iter(range(STEPS)):
        answers = probe((seen - mean) / spread)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(answers, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    chances = probe((unseen - mean) / spread)[:, 0].sigmoid().save()
    weights = probe.state_dict().save()

print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
for prompt, chance in zip(UNSEEN, chances, strict=True):
    print(f"{chance:.0%} good: {prompt!r}")
print(f"the probe has {sum(value.numel() for value in weights.values())} weights")

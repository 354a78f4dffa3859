"""SAE features: which features of a sparse autoencoder a prompt turns on.

The autoencoder here is a small one that the script itself trains, on hidden states of a few
sentences, so its features mean little; put a real one in its place. It is an ordinary `nn.Module`
that is called on a hidden state inside the trace: its weights are uploaded once, by content hash,
and only the features come back (TopK: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders").
"""

from __future__ import annotations

import torch
from _arguments import parse
from torch import nn

from insitu import LanguageModel

TEXTS = [
    "The Eiffel Tower is in the city of Paris, the capital of France.",
    "Water boils at one hundred degrees and freezes at zero.",
    "def add(a, b):\n    return a + b",
    "She sold the house by the sea and moved to the mountains.",
]


class TopKAutoencoder(nn.Module):
    """Keeps the k largest of many features."""

    def __init__(self, size: int, num_features: int, k: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(size, num_features)
        self.decoder = nn.Linear(num_features, size)
        self.k = k

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives the features, [..., num_features], all but k of them 0."""
        top = torch.topk(torch.relu(self.encoder(hidden)), self.k, dim=-1)
        return torch.zeros_like(self.encoder(hidden)).scatter(-1, top.indices, top.values)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives the hidden state again, from its features."""
        return self.decoder(self.features(hidden))


arguments = parse(__doc__, prompt="The Louvre is a museum in Paris.", layer="15")
model = LanguageModel(arguments.model)
layer = model.model.layers[int(arguments.layer)]

with model.session(remote=arguments.remote):
    hidden_states = []
    for text in TEXTS:
        with model.trace(text):
            hidden_states.append(layer.output[0, 1:].save())
data = torch.cat([hidden.float() for hidden in hidden_states])
center, scale = data.mean(0), data.std()

torch.manual_seed(0)
sae = TopKAutoencoder(data.shape[-1], num_features=1024, k=16)
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
for _ in range(300):
    optimizer.zero_grad()
    normed = (data - center) / scale
    loss = nn.functional.mse_loss(sae(normed), normed)
    loss.backward()
    optimizer.step()
print(f"trained on {len(data)} hidden states to a loss of {loss:.5f}")

with torch.no_grad(), model.trace(arguments.prompt, remote=arguments.remote):
    # Without the first position, whose hidden state is huge in every prompt.
    features = sae.features((layer.output[0, 1:].float() - center) / scale)
    strongest = features.topk(3, dim=-1).save()

tokens = [model.tokenizer.decode(token) for token in model.tokenizer(arguments.prompt)["input_ids"]]
for token, values, indices in zip(tokens[1:], strongest.values, strongest.indices, strict=True):
    shown = "  ".join(f"{int(i)}: {float(v):.2f}" for i, v in zip(indices, values, strict=True))
    print(f"{token!r:12}  {shown}")

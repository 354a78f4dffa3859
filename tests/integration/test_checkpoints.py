"""Layers that run again in the backward pass: through servers, on one rank and on two."""

from __future__ import annotations

import pytest
import torch

import insitu
from insitu import CONFIG, CapacityError, LanguageModel
from support.tiny_models import TinyModels
from support.up import Up

IDS = list(range(3, 67))
# Between what the estimates for the trace are with checkpoints and without.
MAX_GRAPH_BYTES = 500_000


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def up(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSITU_MAX_GRAPH_BYTES", str(MAX_GRAPH_BYTES))
        models = [f"tiny/llama={tiny.folder('llama')}"]
        flags = ["--tp", str(request.param)]
        with Up(tmp_path_factory.mktemp("checkpoints"), models, flags) as up:
            yield up


def _trained(model: LanguageModel, **options: bool) -> torch.Tensor:
    with model.session(**options) as session:
        vector = session.parameter(torch.zeros(64))
        optimizer = insitu.optim.Adam([vector], lr=1e-2)
        for _ in range(5):
            with model.trace(IDS):
                model.blocks[0].output[:] += vector
                model.unembed.output[0, -1].log_softmax(-1)[7].backward()
            optimizer.step()
            optimizer.zero_grad()
        result = vector.save()
    return result.detach()


def test_what_fits_with_checkpoints_alone_is_trained_as_without(
    up: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    expected = _trained(LanguageModel(str(tiny.folder("llama"))))
    model = LanguageModel("tiny/llama")
    with pytest.raises(CapacityError, match="checkpoint=True"):
        _trained(model, remote=True)
    found = _trained(model, remote=True, checkpoint=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

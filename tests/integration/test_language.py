"""The language through real servers, on one rank and on two, is the language in process."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from insitu import CONFIG, LanguageModel
from support import training_cases as cases
from support.experiments import EXPERIMENTS, IDS, assert_same
from support.streaming import Remembering
from support.tiny_models import TinyModels
from support.up import Up

# Padded rows, split tensors and graphs round by how the machine's cores share the work.
ROUNDED = ("invokes", "gradients", "gradients_together", "attention")


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def up(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    models = [f"tiny/llama={tiny.folder('llama')}"]
    flags = ["--tp", str(request.param)]
    with Up(tmp_path_factory.mktemp("language"), models, flags) as up:
        yield up


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_gives_the_same_everywhere(
    up: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    experiment = EXPERIMENTS[name]
    expected = experiment(LanguageModel(str(tiny.folder("llama"))))
    actual = experiment(LanguageModel("tiny/llama"), remote=True)
    is_exact = up.flags[-1] == "1" and name not in ROUNDED
    tolerance = 0 if is_exact else 1e-5
    assert_same(actual, expected, atol=tolerance, rtol=tolerance)


_TRAINED = {
    "probe": (cases.probe, lambda module, _: cases.plain_probe(module)),
    "steering": (cases.steering, lambda module, _: cases.plain_steering(module)),
    "lora": (cases.lora, cases.plain_lora),
}


@pytest.mark.parametrize("name", _TRAINED)
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks it so
def test_what_is_trained_is_what_plain_torch_trains(
    up: Up,
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    caplog.set_level("INFO", "insitu")
    train, train_plainly = _TRAINED[name]
    actual = train(LanguageModel("tiny/llama"), remote=True)
    expected = train_plainly(tiny.module("llama"), actual)
    assert_same({key: actual[key] for key in expected}, expected, atol=1e-4)
    stored = load(save(dict(actual)))
    assert_same({key: stored[key] for key in actual}, actual, atol=0)
    told = [record for record in caplog.records if "LOG: step" in record.getMessage()]
    assert len(told) == (cases.STEPS // 2 if name == "lora" else 0)


def test_a_streamer_is_given_the_tokens_of_plain_transformers(
    up: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    ours, theirs = Remembering(), Remembering()
    module = tiny.module("llama")
    module.generate(torch.tensor([IDS]), max_new_tokens=5, streamer=theirs)
    with LanguageModel("tiny/llama").generate(IDS, max_new_tokens=5, remote=True, streamer=ours):
        pass
    assert ours.told == theirs.told

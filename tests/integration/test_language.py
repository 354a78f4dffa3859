"""The language through real servers, on one rank and on two, is the language in process."""

from __future__ import annotations

import pytest

from insitu import CONFIG, LanguageModel
from support.experiments import EXPERIMENTS, assert_same
from support.tiny_models import TinyModels
from support.up import Up


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
    # Padded rows and split tensors round by how the machine's cores share the work.
    is_exact = up.flags[-1] == "1" and name != "invokes"
    assert_same(actual, expected, atol=0 if is_exact else 1e-5)

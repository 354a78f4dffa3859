"""Every family through a real server gives what hand-written hooks give."""

from __future__ import annotations

import pytest
import torch

from insitu import CONFIG, LanguageModel
from support.judge import with_hooks, with_insitu
from support.tiny_models import CONFIGS, TinyModels
from support.up import Up


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Up:
    models = [f"tiny/{family}={tiny.folder(family)}" for family in CONFIGS]
    with Up(tmp_path_factory.mktemp("families"), models) as up:
        yield up


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_language_equals_hand_written_hooks(
    family: str, up: Up, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    expected = with_hooks(tiny.module(family))
    actual = with_insitu(LanguageModel(f"tiny/{family}"), remote=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)

"""A deployment with less memory than models loads what is asked for, and says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from insitu import CONFIG, CapacityError, LanguageModel
from support.judge import with_hooks, with_insitu
from support.up import Up, insitu, ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Two models, and room for one."""
    models = [f"tiny/{family}={tiny.folder(family)}" for family in FAMILIES]
    with Up(tmp_path_factory.mktemp("life"), models, ["--max-loaded", "1"]) as up:
        yield up


@pytest.fixture(autouse=True)
def client(up: Up, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")
    caplog.set_level(logging.INFO, "insitu")


def _served(up: Up) -> set[str]:
    """The models whose shard groups have processes."""
    started = up.descendants()
    return {family for family in FAMILIES if ranks(started, model=f"tiny/{family}")}


def test_each_model_is_loaded_when_it_is_asked_for_in_place_of_the_other(
    up: Up, tiny: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("gpt2", "llama"):
        actual = with_insitu(LanguageModel(f"tiny/{family}"), remote=True)
        for name, expected in with_hooks(tiny.module(family)).items():
            assert torch.equal(actual[name], expected), name
        assert _served(up) == {family}
    assert "tiny/gpt2 is being loaded" in caplog.text
    state = insitu(
        "status", INSITU_ENDPOINT=up.endpoint, INSITU_API_KEY="tests", COLUMNS="150"
    ).stdout
    assert "models of hosts" in state
    assert "unloaded" in state


def test_a_session_over_more_models_than_there_is_room_for_is_refused() -> None:
    llama, gpt2 = (LanguageModel(f"tiny/{family}") for family in FAMILIES)
    with pytest.raises(
        CapacityError, match="2 models at the same time, and the server has memory for 1"
    ):
        with llama.session(remote=True):
            with llama.trace(IDS):
                hidden = llama.lm_head.output[0, 0, :64]
            with gpt2.trace(IDS):
                gpt2.lm_head.output[0, 0, :64] = hidden
                gpt2.lm_head.output.save()


def test_a_model_whose_process_dies_is_loaded_again(up: Up) -> None:
    def run() -> torch.Tensor:
        model = LanguageModel("tiny/llama")
        with model.trace(IDS, remote=True):
            logits: torch.Tensor = model.lm_head.output.save()
        return logits

    expected = run()
    for process in ranks(up.descendants()):
        process.kill()
        psutil.wait_procs([process])
    assert torch.equal(run(), expected)

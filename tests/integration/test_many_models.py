"""Sessions over several models through real servers: values move from group to group."""

from __future__ import annotations

import pytest
import torch

import insitu
from insitu import CONFIG, LanguageModel, VersionError
from support.tiny_models import TinyModels
from support.up import Up

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def up(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    models = [f"tiny/{family}={tiny.folder(family)}" for family in ("llama", "qwen3")]
    flags = ["--tp", str(request.param)]
    with Up(tmp_path_factory.mktemp("models"), models, flags) as up:
        yield up


@pytest.fixture(autouse=True)
def _server(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setattr(CONFIG, "_api_key", "tests")


def _swap(base: LanguageModel, other: LanguageModel, *, remote: bool) -> list[torch.Tensor]:
    """Moves values to and fro, with a list and a variable that both models change."""
    with base.session(remote=remote):
        norms = insitu.list().save()
        total = insitu.variable(torch.zeros(64))
        with base.trace(IDS):
            hidden = base.model.layers[1].output[0]
            norms.append(hidden.norm())
        with other.trace(IDS):
            other.model.layers[1].output = hidden
            norms.append(other.lm_head.output.norm())
            total.update(total + other.model.layers[2].output[0][0, -1])
            patched = other.lm_head.output.save()
        with base.trace(IDS):
            base.model.layers[0].output[:, -1] = total
            norms.append(base.lm_head.output.norm())
            back = base.lm_head.output.save()
        lens = other.lm_head(other.model.norm(hidden)).save()
        hidden.save()
    return [patched, back, lens, hidden[0], *norms]


def test_values_move_between_models_as_they_do_in_process(tiny: TinyModels) -> None:
    local = [LanguageModel(str(tiny.folder(family))) for family in ("llama", "qwen3")]
    expected = _swap(*local, remote=False)
    actual = _swap(LanguageModel("tiny/llama"), LanguageModel("tiny/qwen3"), remote=True)
    assert len(actual) == len(expected) == 7
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_a_brought_tensor_reaches_the_groups_of_all_models() -> None:
    base, other = LanguageModel("tiny/llama"), LanguageModel("tiny/qwen3")
    brought = torch.randn(64, 1024)
    with base.session(remote=True):
        with base.trace(IDS):
            first = base.model.layers[0].output[0].save()
            product = (first @ brought).save()
        with other.trace(IDS):
            second = other.model.layers[0].output[0].save()
            both = (product + second @ brought).save()
    expected = first @ brought + second @ brought
    torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-3)


def test_sessions_over_the_same_models_in_either_order_all_end(up: Up) -> None:
    base, other = LanguageModel("tiny/llama"), LanguageModel("tiny/qwen3")
    submissions = []
    for first, second in [(base, other), (other, base)] * 3:
        with first.session(remote=True, blocking=False) as session:
            with first.trace(IDS):
                hidden = first.model.layers[0].output[0]
            with second.trace(IDS):
                second.model.layers[0].output = hidden
                second.lm_head.output.argmax(-1).save()
        submissions.append(session.submission)
    with base.trace(IDS, remote=True):
        base.lm_head.output.save()
    for submission in submissions:
        assert len(submission.result(timeout=60)) == 1


def test_a_loop_over_two_models_says_what_to_do() -> None:
    base, other = LanguageModel("tiny/llama"), LanguageModel("tiny/qwen3")
    with pytest.raises(VersionError, match=r"two models.*plain `for`"):
        with base.session(remote=True) as session, session.iter([1, 2]):
            with base.trace(IDS):
                hidden = base.model.layers[0].output[0]
            with other.trace(IDS):
                other.model.layers[0].output = hidden
                other.lm_head.output.save()

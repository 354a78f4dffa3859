"""Calls of one module in one trace become one call, with the results of many."""

from __future__ import annotations

import pytest
import torch

from insitu import LanguageModel
from support.tiny_models import TinyModels

IDS = list(range(1, 15))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request: pytest.FixtureRequest, tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder(request.param)))


def _lens(model: LanguageModel, *, exact: bool) -> list[torch.Tensor]:
    base = model.transformer if hasattr(model, "transformer") else model.model
    layers = base.h if hasattr(base, "h") else base.layers
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    with model.session(exact=exact), model.trace(IDS):
        hidden = [layer.output[0] for layer in layers]
        parts = [hidden[0][:, -1], hidden[-1][0], hidden[1][:, 2:5]]
        return [model.lm_head(norm(part)).save() for part in parts]


def test_one_call_gives_what_many_give(model: LanguageModel) -> None:
    calls: list[torch.Size] = []
    jointly = _lens(model, exact=False)
    head = model._local._model.modules["lm_head"]
    hook = head.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    again = _lens(model, exact=False)
    num_joint = len(calls)
    one_by_one = _lens(model, exact=True)
    hook.remove()
    assert num_joint == 1
    assert len(calls) == num_joint + len(one_by_one)
    for joint, same, single in zip(jointly, again, one_by_one, strict=True):
        assert joint.shape == single.shape
        assert torch.equal(joint, same)
        torch.testing.assert_close(joint, single, atol=1e-5, rtol=1e-5)


def test_a_write_between_two_calls_is_seen_by_the_second_only(model: LanguageModel) -> None:
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for exact in (False, True):
        with model.session(exact=exact), model.trace(IDS):
            part = model.lm_head.input[:, -1].clone()
            before = model.lm_head(part).save()
            part *= 2
            after = model.lm_head(part).save()
        results.append((before, after))
    (before, after), (before_alone, after_alone) = results
    torch.testing.assert_close(before, before_alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, after_alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after)

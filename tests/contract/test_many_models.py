"""Sessions over several models: values of one are written into another."""

from __future__ import annotations

import pytest
import torch

from insitu import InvalidTraceError, LanguageModel
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def base(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture(scope="module")
def other(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("qwen3")))


def test_values_of_one_model_are_written_into_another(
    base: LanguageModel, other: LanguageModel
) -> None:
    with base.session():
        with base.trace(IDS):
            hidden = base.model.layers[1].output[0]
        with other.trace(IDS):
            other.model.layers[1].output = hidden
            patched = other.lm_head.output.save()
        lens = base.lm_head(base.model.norm(hidden)).save()
        other_lens = other.lm_head(other.model.norm(hidden)).save()
        hidden.save()
    with other.trace(IDS):
        other.model.layers[1].output = hidden
        expected = other.lm_head.output.save()
    assert torch.equal(patched, expected)
    assert lens.shape == other_lens.shape == (1, 4, 256)


def test_a_module_of_another_model_is_not_in_a_trace(
    base: LanguageModel, other: LanguageModel
) -> None:
    with pytest.raises(InvalidTraceError, match="this trace runs"):
        with base.session(), base.trace(IDS):
            _ = other.model.layers[0].output
    with pytest.raises(InvalidTraceError, match="this trace runs"):
        with base.session(), base.trace(IDS):
            other.lm_head(base.model.layers[0].output[0])


def test_a_loop_may_run_both(base: LanguageModel, other: LanguageModel) -> None:
    with base.session() as session:
        with session.iter([0.0, 2.0]) as scale:
            with base.trace(IDS):
                hidden = base.model.layers[1].output[0] * scale
            with other.trace(IDS):
                other.model.layers[1].output = hidden
                logits = other.lm_head.output.save()
    with base.trace(IDS):
        scaled = (base.model.layers[1].output[0] * 2).save()
    with other.trace(IDS):
        other.model.layers[1].output = scaled
        expected = other.lm_head.output.save()
    assert torch.equal(logits, expected)

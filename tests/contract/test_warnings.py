"""Code that does nothing is warned of, at its line, before anything is sent."""

from __future__ import annotations

import warnings

import pytest

import insitu
from insitu import InvalidTraceError, LanguageModel, UnusedValueWarning
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def test_a_rebind_that_looks_like_a_write_is_warned_of(model: LanguageModel) -> None:
    with pytest.warns(UnusedValueWarning, match=r"'x' is neither saved nor used.*output\[") as seen:
        with model.trace(IDS):
            x = model.model.layers[0].output[0]
            x = x * 0
            model.lm_head.output.save()
    (warning,) = seen
    assert warning.filename == __file__
    with open(__file__) as source:
        assert source.readlines()[warning.lineno - 1].strip() == "x = x * 0"


def test_a_value_that_is_saved_nowhere_and_used_nowhere_is_warned_of(model: LanguageModel) -> None:
    with pytest.warns(UnusedValueWarning, match="'logits' is neither"):
        with model.trace(IDS):
            logits = model.lm_head.output
            model.model.layers[0].output.save()
    del logits


def test_what_is_used_is_not_warned_of(model: LanguageModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedValueWarning)
        with model.session() as session:
            kept = insitu.list().save()
            total = insitu.variable(0.0 * insitu_zero())
            with model.trace(IDS) as tracer:
                hidden = model.model.layers[0].output[0]
                hidden[:, -1] = 0
                tracer.log(hidden.norm())
                kept.append(model.lm_head.output)
                total.update(total + hidden.sum())
            with session.iter([1, 2]) as item, session.cond(item > 1):
                session.log(item)
            total.save()
    assert len(kept) == 1


def insitu_zero() -> object:
    """Gives a tensor made outside any session."""
    import torch

    return torch.zeros(())


def test_what_lives_where_a_session_runs_is_made_in_one() -> None:
    for make in (insitu.list, insitu.dict, lambda: insitu.variable(insitu_zero())):
        with pytest.raises(InvalidTraceError, match=r"inside a `with model.session"):
            make()


def test_an_edit_saves_nothing(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="save it in the traces"):
        with model.edit():
            model.model.layers[0].output.save()

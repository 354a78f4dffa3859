"""Values that are kept from one session to the next, in process."""

from __future__ import annotations

import pytest
import torch

from insitu import Error, Handle, InvalidTraceError, LanguageModel, NotFoundError
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def test_cell_by_cell_is_one_session(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
        direction = hidden.mean(1)
        with model.trace(IDS[::-1]):
            model.model.layers[1].output[:, -1] = direction
            expected = model.lm_head.output.save()

    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
    assert isinstance(kept, Handle)
    assert kept.shape == (1, 4, 64)
    with model.session():
        direction = kept.mean(1).keep()
    with model.trace(IDS[::-1]):
        model.model.layers[1].output[:, -1] = direction
        actual = model.lm_head.output.save()
    assert torch.equal(actual, expected)


def test_a_handle_is_a_value_of_its_own_session_too(model: LanguageModel) -> None:
    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
        doubled = (kept * 2).save()
    with model.session():
        again = (kept + kept).save()
    assert torch.equal(again, doubled)


def test_what_is_written_to_a_loaded_value_does_not_change_what_is_kept(
    model: LanguageModel,
) -> None:
    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
        model.model.layers[1].output[0][:] = 7
    for _ in range(2):
        with model.session():
            before = kept.clone().save()
            kept[:] = 0
            after = kept.clone().save()
        assert before.abs().sum() > 0
        assert not (before == 7).any()
        assert after.abs().sum() == 0


def test_a_handle_is_loaded_where_it_is_surely_set(model: LanguageModel) -> None:
    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
    with model.session() as session:
        with session.cond(False):
            _ = (kept * 2).sum()
        total = kept.sum().save()
    assert total.ndim == 0


def test_a_handle_that_was_let_go_is_refused_at_the_line_that_uses_it(
    model: LanguageModel,
) -> None:
    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
    kept.release()
    kept.release()
    with pytest.raises(NotFoundError, match="no kept value") as raised:
        with model.trace(IDS):
            model.model.layers[1].output = kept
            model.lm_head.output.save()
    assert raised.value.location is not None
    assert "= kept" in raised.value.location.source


def test_a_value_is_kept_in_its_session_only(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[1].output[0]
    with pytest.raises(Error, match=r"call .keep\(\) in the block"):
        hidden.keep()


def test_a_handle_of_another_model_is_used_between_traces(
    model: LanguageModel, tiny: TinyModels
) -> None:
    other = LanguageModel(str(tiny.folder("qwen3")))
    with model.trace(IDS):
        kept = model.model.layers[1].output[0].keep()
        hidden = model.model.layers[1].output[0].save()
    with pytest.raises(Error, match=r"before the trace"):
        with other.trace(IDS):
            other.model.layers[1].output = kept
    with other.session():
        value = kept.clone()
        with other.trace(IDS):
            other.model.layers[1].output = value
            written = other.model.layers[1].output[0].save()
    assert torch.equal(written, hidden)


def test_a_trace_that_fails_keeps_nothing(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError):
        with model.trace(IDS):
            first = model.model.layers[0].output[0]
            kept = first.keep()
            model.model.layers[1].output = first[first > 0]
    with pytest.raises(NotFoundError):
        with model.session():
            kept.sum().save()

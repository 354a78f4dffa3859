"""What session.explain() says, and that the session then runs so."""

from __future__ import annotations

import logging

import pytest
import torch

import insitu
from insitu import LanguageModel
from support.tiny_models import TinyModels

IDS = list(range(1, 15))
OTHERS = list(range(2, 16))


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def _patched(model: LanguageModel, layer: int) -> torch.Tensor:
    with model.trace(IDS):
        model.model.layers[layer].output[0][:, -1] = 0
        saved: torch.Tensor = model.lm_head.output[:, -1].save()
    return saved


def _num_forwards(model: LanguageModel) -> list[int]:
    """Gives a list that grows by the rows of each forward pass of the model."""
    rows: list[int] = []
    module = model._local._model.module
    module.model.embed_tokens.register_forward_hook(lambda *at: rows.append(len(at[2])))
    return rows


def test_a_sweep_is_one_pass_whose_rows_fork(model: LanguageModel) -> None:
    rows = _num_forwards(model)
    with model.session() as session:
        saved = [_patched(model, layer) for layer in range(2)]
    (planned,) = session.explain().passes
    assert (planned.traces, planned.rows, planned.note) == ((1, 2), 3, "")
    # Of 3 layers, one row of 14 tokens runs through all, the last token of another through two and
    # that of a third through one: 45 tokens, counted as 4 rows.
    assert (planned.tokens, planned.layers_run, planned.layers_saved) == (14 + 2, 4, 2)
    assert rows == [1]
    for layer, value in enumerate(saved):
        assert torch.equal(value, _patched(model, layer))


def test_an_exact_session_merges_nothing(model: LanguageModel) -> None:
    rows = _num_forwards(model)
    with model.session(exact=True) as session:
        for layer in range(2):
            _patched(model, layer)
    plan = session.explain()
    assert [planned.traces for planned in plan.passes] == [(1,), (2,)]
    assert "exact" in plan.passes[0].note
    assert rows == [1, 1]


def test_different_lengths_share_a_pass_where_padding_is_allowed(model: LanguageModel) -> None:
    prompts = [IDS, IDS[:5], OTHERS]
    rows = _num_forwards(model)
    saved = []
    for padding in (False, True):
        with model.session(padding=padding) as session:
            for prompt in prompts:
                with model.trace(prompt):
                    model.model.layers[0].output[0][:, 0] *= 2
                    saved.append(model.lm_head.output.save())
        notes = [planned.note for planned in session.explain().passes]
        apart = (
            "its prompt has 5 tokens, and that of trace 1 14; with padding=True they may share a "
            "pass"
        )
        assert notes == ([""] if padding else ["", apart])
    assert rows == [2, 1, 3]
    for plain, padded in zip(saved[:3], saved[3:], strict=True):
        assert plain.shape == padded.shape
        torch.testing.assert_close(plain, padded, atol=1e-4, rtol=1e-4)


def test_a_trace_that_writes_what_another_gave_waits_for_it(model: LanguageModel) -> None:
    with model.session(run=False) as session:
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            clean = model.lm_head.output[:, -1]
        with model.trace(OTHERS):
            model.model.layers[0].output[0][:, 3] = hidden[:, 3]
            model.lm_head.output[:, -1].save()
        with model.trace(OTHERS):  # what is compared only does not have to wait
            (model.lm_head.output[:, -1] - clean).save()
    passes = session.explain().passes
    assert [planned.traces for planned in passes] == [(1, 3), (2,)]
    assert [planned.note for planned in passes] == ["", "it waits for what trace 1 gives"]


def test_it_says_why_traces_of_other_kinds_have_passes_of_their_own(model: LanguageModel) -> None:
    with model.session(run=False) as session:
        _patched(model, 0)
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            model.lm_head.output[0, -1].sum().backward()
            hidden.grad.save()
        with model.generate(IDS, max_new_tokens=3) as tracer:
            tracer.result.save()
        with model.trace([IDS, IDS[:9]]):
            model.lm_head.output[:, -1].save()
    assert [planned.note for planned in session.explain().passes] == [
        "",
        "it takes gradients, and trace 1 is one forward pass",
        "it generates, and trace 2 takes gradients; a pass for each of up to 3 tokens",
        "of it and trace 1 one has rows of several lengths",
    ]


def test_it_says_why_the_items_of_a_loop_have_passes_of_their_own(model: LanguageModel) -> None:
    with model.session(run=False) as session:
        with session.iter([1.0, 2.0]) as scale:
            with model.trace(IDS):
                model.model.layers[0].output[0][:] *= scale
                model.lm_head.output.save()
            with model.trace(IDS):
                model.lm_head.output.save()
        with model.trace(IDS):
            model.lm_head.output.save()
    per_item, after = session.explain().passes
    assert (per_item.traces, after.traces) == ((1, 2), (3,))
    assert "for each item of a loop by itself" in per_item.note
    assert not after.note


def test_lists_across_traces_keep_their_order_in_one_pass(model: LanguageModel) -> None:
    rows = _num_forwards(model)
    with model.session():
        found = insitu.list().save()
        for shift in (3.0, 1.0, 2.0):
            with model.trace(IDS):
                model.model.layers[1].output[0][:] = shift
                found.append(model.model.layers[1].output[0][0, 0, 0])
    assert [float(value) for value in found] == [3.0, 1.0, 2.0]
    assert rows == [1]


def test_explain_in_the_block_tells_of_what_is_recorded_so_far(model: LanguageModel) -> None:
    with model.session() as session:
        _patched(model, 0)
        assert len(session.explain().passes) == 1
        assert "quantum" not in str(session.explain())
        with model.trace(IDS):
            model.model.layers[0].skip(model.model.embed_tokens.output)
            model.lm_head.output.save()
        plan = session.explain()
    text = str(plan)
    assert "it skips model.layers.0" in text
    assert "2 traces in 2 passes" in text
    assert "had its quantum" in text
    assert "<table>" in plan._repr_html_()
    assert "it skips model.layers.0" in plan._repr_html_()


def test_no_pass_failed_as_a_whole(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), model.session():
        for layer in range(2):
            _patched(model, layer)
    assert not caplog.records

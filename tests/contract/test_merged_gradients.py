"""Traces that take gradients share a pass and a backward pass, and none notices the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from insitu import LanguageModel
from insitu_shard.engine import joint_backward
from support import random_gradients
from support.random_gradients import traces
from support.same_merged import check_same, told
from support.tiny_models import CONFIGS, TinyModels

PROMPTS = [[5, 9, 17, 23], [6, 3, 88, 41], [71, 2, 2, 30], [5, 9, 17, 23]]
# Rows are multiplied with others beside them, and experts with more of them.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture
def backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many traces each of the common backward passes is of."""
    sizes: list[int] = []
    take = joint_backward.gradients_of

    def counted(several: Any) -> Any:
        sizes.append(len(several))
        return take(several)

    monkeypatch.setattr(joint_backward, "gradients_of", counted)
    return sizes


def _score(model: LanguageModel, token: int) -> Any:
    return model.unembed.output[0, -1].log_softmax(-1)[token]


def _num_passes(model: LanguageModel, record: Any) -> int:
    with model.session(run=False) as session:
        record(session, {})
    return len(session.explain().passes)


def _attributions(model: LanguageModel) -> Any:
    def record(_: Any, values: dict[str, Any]) -> None:
        for number, ids in enumerate(PROMPTS):
            with model.trace(ids):
                hidden = [block.output[0] for block in model.blocks][number % 2 :]
                _score(model, 7 + number).backward()
                for layer, at in enumerate(hidden):
                    values[f"{number}, layer {layer}"] = at.grad.save()
                values[f"{number}, times value"] = (at.grad * at).sum(-1).save()

    return record


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_gradients_are_as_one_by_one(
    tiny: TinyModels,
    family: str,
    caplog: pytest.LogCaptureFixture,
    backward_passes: list[int],
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    record = _attributions(model)
    merged = check_same(model, record, caplog, tolerance=TOLERANCE)
    assert _num_passes(model, record) == 1
    assert backward_passes == [len(PROMPTS)]
    # The first and the last are of one prompt, and of two losses.
    assert not torch.allclose(merged.values["0, layer 1"], merged.values["3, layer 0"])


def test_gradients_are_those_of_plain_autograd(tiny: TinyModels, model: LanguageModel) -> None:
    with model.session():
        found = []
        for number, ids in enumerate(PROMPTS):
            with model.trace(ids):
                embedded = model.embed.output
                _score(model, 7 + number).backward()
                found.append(embedded.grad.save())
    module = tiny.module("llama").requires_grad_(False)
    for number, (ids, gradient) in enumerate(zip(PROMPTS, found, strict=True)):
        embedded = module.get_input_embeddings()(torch.tensor([ids])).requires_grad_()
        logits = module(inputs_embeds=embedded, use_cache=False).logits
        logits[0, -1].log_softmax(-1)[7 + number].backward()
        torch.testing.assert_close(gradient, embedded.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_trace_sees_neither_writes_nor_gradients_of_others(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def record(_: Any, values: dict[str, Any]) -> None:
        with model.trace(PROMPTS[0]):
            first = model.blocks[0].output[0]
            first[:, 1] = 3.0
            vector = torch.zeros(64)
            last = model.blocks[1].output[0]
            last[:] = last * 2 + vector
            _score(model, 3).backward()
            values["written"], values["by vector"] = first.grad.save(), vector.grad.save()
        with model.trace(PROMPTS[0]):
            embedded, first = model.embed.output, model.blocks[0].output[0]
            inner = model.blocks[1].mlp.act_fn.output
            _score(model, 3).backward()
            values["plain"], values["embedded"] = first.grad.save(), embedded.grad.save()
            values["inside"] = inner.grad.save()
        with model.trace(PROMPTS[1]):
            first = model.blocks[0].output[0]
            with (first.norm() * 1e3).backward():
                values["early loss"] = first.grad.save()
        with model.trace(PROMPTS[2]):
            first, last = model.blocks[0].output[0], model.blocks[1].output[0]
            with _score(model, 5).backward():
                last.grad = torch.ones(1, 4, 64)
                values["of what was written"] = first.grad.save()

    check_same(model, record, caplog, tolerance=TOLERANCE)
    assert _num_passes(model, record) == 1


def test_a_trace_whose_numbers_overflow_leaves_others_theirs(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Zero times infinity is no number: a backward pass for all would give it to each of them."""

    def record(_: Any, values: dict[str, Any]) -> None:
        with model.trace(PROMPTS[0]):
            first, last = model.blocks[0].output[0], model.blocks[1].output[0]
            last[:] = last * torch.inf
            first.sin().sum().backward()
            values["before it overflows"] = first.grad.save()
            values["infinite"] = model.unembed.output[0, -1, 0].save()
        for number in (1, 2):
            with model.trace(PROMPTS[number]):
                first = model.blocks[0].output[0]
                _score(model, 9).backward()
                values[f"{number}"] = first.grad.save()

    merged = check_same(model, record, caplog, tolerance=TOLERANCE)
    assert merged.values["before it overflows"].isfinite().all()
    assert not merged.values["infinite"].isfinite()


def _check_second_fails(model: LanguageModel, record: Any, caplog: pytest.LogCaptureFixture) -> Any:
    """Checks that the second trace fails as it does alone, and the first does not; gives why."""
    alone = told(model, record, caplog, exact=True)
    merged = told(model, record, caplog)
    assert merged.error == alone.error
    reason, _, trace_number, _ = merged.error
    assert trace_number == 2
    torch.testing.assert_close(merged.values["0"], alone.values["0"], rtol=1e-5, atol=1e-5)
    return reason


def test_an_error_is_of_its_trace_alone(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of all traces are in one graph, and yet no loss depends on those of another."""

    def record(_: Any, values: dict[str, Any]) -> None:
        for number in range(3):
            with model.trace(PROMPTS[number]):
                first, last = model.blocks[0].output[0], model.blocks[1].output[0]
                loss = first.sum() if number == 1 else _score(model, 9)
                loss.backward()
                values[f"{number}"] = last.grad.save()

    _check_second_fails(model, record, caplog)


def test_a_written_gradient_that_does_not_fit_is_the_error_of_its_trace_alone(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def record(_: Any, values: dict[str, Any]) -> None:
        for number in range(3):
            with model.trace(PROMPTS[number]):
                first, last = model.blocks[0].output[0], model.blocks[1].output[0]
                with _score(model, 9).backward():
                    if number == 1:
                        # Its shape is known only when it runs.
                        last.grad = torch.ones(1, 4, 64).nonzero().float()
                    values[f"{number}"] = first.grad.save()

    assert _check_second_fails(model, record, caplog) == "SHAPE_MISMATCH"


def test_later_traces_use_gradients_together_too(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def record(_: Any, values: dict[str, Any]) -> None:
        for number, ids in enumerate(PROMPTS):
            with model.trace(ids):
                hidden = model.blocks[0].output[0]
                _score(model, 9).backward()
                step = hidden.grad * 0.5
            with model.trace(ids):
                model.blocks[0].output[0] += step
                values[f"{number}"] = _score(model, 9).save()

    check_same(model, record, caplog, tolerance=TOLERANCE)
    assert _num_passes(model, record) == 2


def test_layers_are_checkpointed_in_a_common_pass(
    model: LanguageModel, backward_passes: list[int]
) -> None:
    found: list[dict[str, Any]] = []
    for options in ({"exact": True}, {"checkpoint": True}):
        values: dict[str, Any] = {}
        with model.session(**options) as session:
            _attributions(model)(session, values)
        found.append(values)
    assert backward_passes == [len(PROMPTS)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_prompts_of_two_lengths_have_two_passes(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def record(_: Any, values: dict[str, Any]) -> None:
        for number, ids in enumerate([*PROMPTS, [1, 2, 3], [4, 5, 6]]):
            with model.trace(ids):
                hidden = model.blocks[0].output[0]
                _score(model, 9).backward()
                values[f"{number}"] = hidden.grad.save()

    check_same(model, record, caplog, tolerance=TOLERANCE)
    check_same(model, record, caplog, tolerance=TOLERANCE, padding=True)
    assert _num_passes(model, record) == 2


def test_explain_says_why_gradients_are_taken_alone(model: LanguageModel) -> None:
    with model.session(run=False) as session:
        weights = session.parameter(torch.zeros(64))
        with model.trace(PROMPTS[0]):
            hidden = model.blocks[0].output[0]
            _score(model, 1).backward(retain_graph=True)
            hidden.grad.save()
            _score(model, 2).backward()
            hidden.grad.save()
        with model.trace(PROMPTS[0]):
            model.blocks[0].output[0][:] += weights
            _score(model, 1).backward()
        with model.trace(PROMPTS[0]):
            hidden = model.blocks[0].output[0]
            hidden.sin().sum().backward()
            model.blocks[1].output[0][:] += hidden.grad
            model.unembed.output.save()
    notes = [planned.note for planned in session.explain().passes]
    assert notes == [
        "it takes gradients in several backward passes",
        "it trains parameters",
        "it uses gradients while its pass runs",
    ]


@pytest.mark.parametrize(("family", "num_draws"), [("llama", 150), ("gpt2", 50), ("gemma3", 50)])
def test_random_gradients_are_as_one_by_one(
    family: str, num_draws: int, tiny: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    model = LanguageModel(str(tiny.folder(family)))

    @settings(
        max_examples=num_draws,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(drawn=traces)
    def check(drawn: list[Any]) -> None:
        def recorded(_: Any, values: dict[str, Any]) -> None:
            random_gradients.record(model, drawn, values)

        check_same(model, recorded, caplog, tolerance=1e-4)

    check()

"""Traces over prompts of different lengths share a pass, each with its own positions only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from insitu import LanguageModel
from insitu_shard.compiler.prefixes import FAMILIES
from support.same_merged import check_same
from support.tiny_models import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.tiny_models import TinyModels

LENGTHS = (14, 12, 20, 13, 20)
PROMPTS = [[3 + 7 * number + at for at in range(length)] for number, length in enumerate(LENGTHS)]
# Attention adds up in another order for rows of another length.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tiny: TinyModels) -> Callable[[str], Any]:
    known: dict[str, LanguageModel] = {}

    def model(family: str) -> Any:
        if family not in known:
            known[family] = LanguageModel(str(tiny.folder(family)))
        return known[family]

    return model


@pytest.fixture
def check(caplog: pytest.LogCaptureFixture) -> Any:
    return partial(check_same, caplog=caplog, tolerance=TOLERANCE)


def _passes(model: Any, record: Any) -> Any:
    with model.session(run=False) as session:
        record(session, {})
    return session.explain().passes


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_and_writes_everywhere_at_any_lengths(
    family: str, models: Any, check: Any
) -> None:
    model = models(family)

    def record(_: Any, saved: dict[str, Any]) -> None:
        for number, prompt in enumerate(PROMPTS):
            with model.trace(prompt):
                saved[f"{number} embedded"] = model.blocks[0].input.save()
                saved[f"{number} hidden"] = model.blocks[0].output[0].save()
                model.blocks[1].output[0][:, -3] = number
                model.blocks[2].input[:] *= 2
                saved[f"{number} last"] = model.blocks[2].output[0].save()
                saved[f"{number} head"] = model.unembed.input.save()
                saved[f"{number} logits"] = model.output["logits"].save()
            with model.trace(prompt):
                model.blocks[1].output[0][0, number + 2 :] += 1.0
                saved[f"{number} best"] = model.unembed.output[0, -1].argmax().save()
                saved[f"{number} chosen"] = model.unembed.output[:, 2 : 5 + number].save()

    check(model, record)
    is_known = CONFIGS[family][0] in FAMILIES
    assert len(_passes(model, record)) == (1 if is_known else 4)


def test_no_position_is_computed_for_the_sake_of_another_row(models: Any, check: Any) -> None:
    model = models("llama")
    with model.trace(PROMPTS[0]):  # has it loaded
        model.lm_head.output.save()
    loaded = model._local._model
    tokens: list[int] = []
    hooks = [
        loaded.modules[f"{path}.mlp"].register_forward_hook(
            lambda *at: tokens.append(at[1][0].shape[:2].numel())
        )
        for path in loaded.outline.blocks
    ]

    def record(_: Any, saved: dict[str, Any]) -> None:
        for number, prompt in enumerate(PROMPTS):
            with model.trace(prompt):
                # Rows go when nothing of theirs is needed any more: the longest ones first.
                layer = model.model.layers[0 if len(prompt) == 20 else 1 + number % 2]
                saved[str(number)] = layer.output[0].save()

    check(model, record)
    for hook in hooks:
        hook.remove()
    assert tokens[-3:] == [sum(LENGTHS), 14 + 12 + 13, 12 + 13]
    (planned,) = _passes(model, record)
    assert (planned.rows, planned.tokens) == (5, sum(LENGTHS))
    assert planned.layers_run == 5 + 3 + 2


def test_rows_of_one_length_that_are_left_are_rows_again(models: Any, check: Any) -> None:
    model = models("gpt2")

    def record(_: Any, saved: dict[str, Any]) -> None:
        for number, prompt in enumerate(PROMPTS):
            with model.trace(prompt):
                layer = model.transformer.h[2 if len(prompt) == 20 else 0]
                saved[f"{number}"] = layer.mlp.output.save()
                if len(prompt) == 20:
                    model.transformer.h[1].output[0][:, 4] = 1.0
                    saved[f"{number} logits"] = model.lm_head.output[:, -1].save()

    check(model, record)


def test_what_is_not_a_number_stays_in_its_row(models: Any, check: Any) -> None:
    model = models("llama")

    def record(_: Any, saved: dict[str, Any]) -> None:
        for number, prompt in enumerate(PROMPTS):
            with model.trace(prompt):
                if number % 2:
                    model.model.layers[0].output[0][:, -1] = float("nan")
                saved[f"{number}"] = model.lm_head.output.save()

    told = check(model, record)
    for number in range(len(PROMPTS)):
        assert told.values[f"{number}"][:, -1].isnan().all() == bool(number % 2)
        assert number % 2 or told.values[f"{number}"].isfinite().all()


def test_lengths_far_apart_and_traces_that_see_whole_rows_stay_apart(models: Any) -> None:
    model = models("llama")

    def record(_: Any, __: Any) -> None:
        for length in (40, 6, 12, 13, 25, 80):
            with model.trace(list(range(3, 3 + length))):
                model.lm_head.output.save()
        for length in (12, 13):
            with model.trace(list(range(3, 3 + length))):
                model.model.layers[1].self_attn.inputs[1]["hidden_states"].save()

    assert [planned.traces for planned in _passes(model, record)] == [
        (1, 5),
        (2,),
        (3, 7),
        (4, 8),
        (6,),
    ]


def test_a_batch_of_prompts_of_one_length_goes_with_others(models: Any, check: Any) -> None:
    model = models("qwen3")
    batch = [PROMPTS[2], PROMPTS[4]]

    def record(_: Any, saved: dict[str, Any]) -> None:
        with model.trace(batch):
            saved["batch"] = model.model.layers[1].output[0][1, -1].save()
        with model.trace() as tracer:
            with tracer.invoke(PROMPTS[0]):
                hidden = model.model.layers[1].output[0]
                saved["one"] = hidden.save()
            with tracer.invoke(PROMPTS[0][::-1]):
                model.model.layers[0].output[0][:, 5] = 1.0
                saved["other"] = model.lm_head.output[:, -1].save()
        for position in range(3, 12):
            with model.trace(PROMPTS[1]):
                model.model.layers[0].output[0][:, position] = 1.5
                saved[f"at {position}"] = model.lm_head.output[0, -1].save()

    check(model, record)
    (planned,) = _passes(model, record)
    assert planned.tokens == 2 * 20 + 2 * 14 + 12 + sum(range(1, 10))


def test_exact_sessions_and_padded_batches_are_as_before(models: Any) -> None:
    model = models("llama")
    with model.session(run=False, exact=True) as exact:
        for prompt in PROMPTS:
            with model.trace(prompt):
                model.lm_head.output.save()
    assert len(exact.explain().passes) == len(PROMPTS)
    with model.session(run=False) as session:
        for prompt in PROMPTS[:2]:
            with model.trace([prompt, PROMPTS[2]]):
                model.lm_head.output.save()
        with model.trace(PROMPTS[2]):
            model.lm_head.output.save()
    assert len(session.explain().passes) == 2

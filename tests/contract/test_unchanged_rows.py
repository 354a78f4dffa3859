"""Traces whose writes turn out to change nothing share the rows that they fork from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from insitu import LanguageModel
from support.same_merged import check_same

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.tiny_models import TinyModels

IDS = list(range(3, 17))
# From position 9 on it is another prompt.
OTHERS = [*IDS[:9], *range(40, 45)]
# The matrices are of other sizes than those of a trace alone.
TOLERANCE = 1e-4

Record = Any


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> Any:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture
def tokens(model: Any, caplog: pytest.LogCaptureFixture) -> Callable[[Record], list[int]]:
    """Compares with a run trace by trace, and gives the tokens of each block of the last pass."""
    with model.trace(IDS):  # has it loaded
        model.lm_head.output.save()
    loaded = model._local._model
    blocks = [loaded.modules[path] for path in loaded.outline.blocks]

    def tokens(record: Record) -> list[int]:
        seen: list[int] = []
        hooks = [
            block.register_forward_hook(lambda *at: seen.append(at[1][0].shape[:2].numel()))
            for block in blocks
        ]
        try:
            check_same(model, record, caplog, tolerance=TOLERANCE)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[-len(blocks) :]

    return tokens


def test_patches_from_a_prompt_that_begins_alike_are_computed_where_it_differs(
    model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        with model.trace(OTHERS):
            others = [layer.output[0] for layer in model.model.layers]
        for number, layer in enumerate(model.model.layers):
            for position in range(14):
                with model.trace(IDS):
                    layer.output[0][:, position] = others[number][:, position]
                    saved[f"{number} {position}"] = model.lm_head.output[0, -1].save()

    # Five positions differ: of the forks for them 5, 4, 3, 2 and 1 positions are computed.
    assert tokens(record) == [14, 14 + 15, 14 + 30]


def test_writes_inside_a_layer_are_looked_at_when_all_of_them_have_been_made(
    model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.model.layers
        with model.trace(IDS):
            saved["clean"] = model.lm_head.output.save()
        for first, second in ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0)):
            for position in range(4, 9):
                with model.trace(IDS):
                    hidden, inside = layers[0].output[0], layers[1].mlp.output
                    hidden[:, position] = hidden[:, position] * first
                    inside[:, position] = inside[:, position] * second
                    saved[f"{first} {second} {position}"] = model.lm_head.output[0, -1].save()

    # Fifteen rows fork before layer 1, and five of them turn out to be as the clean one there.
    assert tokens(record) == [14, 14 + 3 * 40, 14 + 2 * 40]


def test_a_row_that_changes_nothing_and_then_something_forks_there(
    model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.model.layers
        for first in (1.0, 2.0):
            for second in (1.0, 2.0):
                with model.trace(IDS):
                    layers[0].output[0][:] *= first
                    saved[f"between {first} {second}"] = layers[1].input.save()
                    layers[1].output[0][:] *= second
                    saved[f"behind {first} {second}"] = layers[2].output[0].save()
                    saved[f"logits {first} {second}"] = model.lm_head.output[0, -1].save()
        with model.trace(IDS):
            saved["clean"] = model.lm_head.output.save()

    assert tokens(record) == [14, 2 * 14, 4 * 14]


def test_the_row_that_others_have_become_stays_for_as_long_as_they_need_it(
    model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.model.layers
        for scale in (1.0, 2.0):
            with model.trace(IDS):
                layers[0].output[0][:] *= scale
                saved[f"logits {scale}"] = model.lm_head.output[0, -2:].save()
        with model.trace(IDS):
            saved["short"] = layers[0].output[0].save()

    assert tokens(record) == [14, 2 * 14, 2 * 14]


def test_traces_that_have_come_to_share_a_row_do_not_share_what_they_read(
    model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.model.layers
        for number in range(3):
            with model.trace(IDS):
                if number:
                    layers[0].output[0][:, number] *= 1.0
                hidden = layers[1].output[0]
                hidden_then = hidden.clone()
                hidden_then += number
                saved[f"read {number}"] = hidden.save()
                saved[f"sum {number}"] = hidden_then.sum().save()
                logits = model.lm_head.output
                saved[f"logits {number}"] = logits[:, -3:].save()
                layers[2].input[:, 3] += number

    tokens(record)


@pytest.mark.parametrize("kept", ["a sign of zero", "nan"])
def test_only_what_is_the_same_to_the_last_bit_is_unchanged(
    kept: str, model: Any, tokens: Callable[[Record], list[int]]
) -> None:
    value = -0.0 if kept == "a sign of zero" else float("nan")

    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.model.layers
        for sign in (1, -1):
            with model.trace(IDS):
                layers[0].output[0][:, -1] = 0.0
                layers[1].input[:, -1] = value * sign
                saved[f"inverse {sign}"] = (1 / layers[1].input[:, -1]).save()

    tokens(record)


def test_padded_rows_that_nothing_has_changed_are_shared(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def record(_: Any, saved: dict[str, Any]) -> None:
        for ids in (IDS, IDS[2:]):
            for scale in (1.0, 1.0, 0.5):
                with model.trace(ids):
                    model.model.layers[0].output[0][:, -2] *= scale
                    saved[f"{len(ids)} {scale}"] = model.lm_head.output[:, -4:].save()
            with model.trace(ids):
                saved[f"{len(ids)}"] = model.lm_head.output.save()

    partial(check_same, tolerance=TOLERANCE, padding=True)(model, record, caplog)

"""Traces that write at some position leave those before it to others, and nobody notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from insitu import LanguageModel
from insitu_shard.compiler.prefixes import FAMILIES
from support.same_merged import check_same
from support.tiny_models import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.tiny_models import TinyModels

IDS = list(range(3, 17))
# The matrices are of other sizes than those of a trace alone.
TOLERANCE = 1e-4

Record = Any


@pytest.fixture(scope="module")
def models(tiny: TinyModels) -> Callable[[str], Any]:
    known: dict[str, LanguageModel] = {}

    def model(family: str) -> Any:
        if family not in known:
            known[family] = LanguageModel(str(tiny.folder(family)))
        return known[family]

    return model


@pytest.fixture
def check(models: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> Any:
    def check(record: Record, family: str = "llama") -> Any:
        """Compares with a run trace by trace, and gives the pass."""
        model = models(family)
        tokens: list[int] = []
        hooks = [
            block.register_forward_hook(lambda *at: tokens.append(at[1][0].shape[:2].numel()))
            for block in _blocks(model)
        ]
        check_same(model, record, caplog, tolerance=TOLERANCE)
        for hook in hooks:
            hook.remove()
        with model.session(run=False) as session:
            record(session, {})
        planned = session.explain().passes[-1]
        # The merged run comes last, and computes as many tokens as the plan says.
        assert max(tokens[-len(hooks) :]) == planned.tokens
        return planned

    return check


def _blocks(model: Any) -> list[torch.nn.Module]:
    with model.trace(IDS):  # has it loaded
        model.unembed.output.save()
    loaded = model._local._model
    return [loaded.modules[path] for path in loaded.outline.blocks]


def _sweep(model: Any, write: Callable[[Any, int], None], saved: dict[str, Any]) -> None:
    """Writes into each layer in all places that are asked for, and saves logits."""
    with model.trace(IDS):
        saved["clean"] = model.lm_head.output.save()
    for layer in range(2):
        for position in range(1, 14, 2):
            with model.trace(IDS):
                write(model.model.layers[layer].output[0], position)
                saved[f"{layer} {position}"] = model.lm_head.output[0, -1].save()


WRITES: dict[str, Callable[[Any, int], None]] = {
    "at a position": lambda hidden, at: hidden.__setitem__((slice(None), at), 1.5),
    "at a position from the end": lambda hidden, at: hidden.__setitem__((0, at - 14), 1.5),
    "at positions from one on": lambda hidden, at: hidden.__setitem__(
        (slice(None), slice(at, None)), 1.5
    ),
    "at a list of positions": lambda hidden, at: hidden.__setitem__(
        (slice(None), [13, at], slice(4)), 1.5
    ),
    "in a view": lambda hidden, at: hidden[0].__setitem__((at, ...), 1.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_half_of_a_sweep_is_not_computed(
    write: Callable[[Any, int], None], check: Any, models: Any
) -> None:
    planned = check(lambda _, saved: _sweep(models("llama"), write, saved))
    # Of two forks at 1, 3, ... 13 each, 7 of 14 positions are left.
    assert planned.tokens == 14 + 2 * 49


def test_what_is_written_to_all_positions_or_in_unknown_places_is_computed_whole(
    check: Any, models: Any
) -> None:
    for write in (
        lambda hidden, at: hidden.__setitem__(slice(None), float(at)),
        lambda hidden, at: hidden[:, at:].mul_(2),
        lambda hidden, at: hidden.__setitem__((0, torch.tensor([at])), 1.5),
    ):
        planned = check(lambda _, saved, write=write: _sweep(models("llama"), write, saved))
        assert planned.tokens == 14 * planned.rows


# Where names differ from those of most families.
NAMES = {
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "self_attn_layer_norm"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_and_writes_inside_and_between_layers_after_a_fork(
    family: str, check: Any, models: Any
) -> None:
    model = models(family)

    def record(_: Any, saved: dict[str, Any]) -> None:
        layers, head = model.blocks, model.unembed
        attention, mlp = NAMES.get(family, ("self_attn", "mlp"))
        with model.trace(IDS):
            saved["clean"] = head.output.save()
        for position in range(4, 14):
            with model.trace(IDS):
                layers[0].output[0][:, position] = 1.5
                saved[f"attention {position}"] = getattr(layers[1], attention).output[0].save()
                saved[f"mlp {position}"] = getattr(layers[1], mlp).output.save()
                saved[f"input {position}"] = layers[2].input.save()
                saved[f"last {position}"] = layers[2].output[0].save()
                saved[f"logits {position}"] = head.output[0, -1].save()
            with model.trace(IDS):
                getattr(layers[1], mlp).output[:, position - 1 :] *= 2
                getattr(layers[1], mlp).output[:, position] = -1.0
                layers[2].output[0][0, position] = 0.5
                saved[f"inside {position}"] = head.output[:, -1].save()

    planned = check(record, family)
    is_known = CONFIGS[family][0] in FAMILIES
    assert (planned.tokens < 14 * planned.rows) == is_known


def test_rows_fork_again_before_and_behind_their_first_write(check: Any, models: Any) -> None:
    model = models("llama")

    def record(_: Any, saved: dict[str, Any]) -> None:
        for first in (6, 9):
            for second in (2, 5, 8, 12):
                for third in (-1, -3):
                    with model.trace(IDS):
                        layers = model.model.layers
                        layers[0].output[0][:, first] = 1.5
                        layers[1].output[0][:, second] = -1.5
                        saved[f"{first} {second} {third} before"] = layers[1].output[0].save()
                        layers[2].mlp.output[:, third] = 2.0
                        saved[f"{first} {second} {third}"] = layers[2].output[0].save()

    planned = check(record)
    assert planned.tokens < 14 * planned.rows


def test_rows_of_several_prompts_and_invokes_fork(check: Any, models: Any) -> None:
    model = models("gpt_neox")
    others = [IDS[::-1], [*IDS[7:], *IDS[:7]]]

    def record(_: Any, saved: dict[str, Any]) -> None:
        layers = model.gpt_neox.layers
        for position in range(3, 14):
            with model.trace(others):
                layers[0].output[0][1, position] = 1.5
                saved[f"batch {position}"] = layers[2].output[0].save()
            with model.trace() as tracer:
                with tracer.invoke(IDS):
                    layers[0].output[0][:, position] = 1.5
                with tracer.invoke(others[0]):
                    saved[f"invoke {position}"] = layers[1].output[0].save()
                    layers[1].output[0][:, -position:] = 1.5
                saved[f"logits {position}"] = model.lm_head.output[:, -1].save()

    planned = check(record, "gpt_neox")
    assert planned.tokens < 14 * planned.rows


def test_padded_rows_and_those_whose_arguments_are_read_are_whole(check: Any, models: Any) -> None:
    model = models("llama")

    def record(_: Any, saved: dict[str, Any], *, length: int = 14) -> None:
        for position in range(4, 14):
            with model.trace([IDS, IDS[:length]]):
                model.model.layers[0].output[0][:, position] = 1.5
                saved[f"{position}"] = model.lm_head.output[:, -1].save()
                if length == 14:
                    saved[f"of {position}"] = (
                        model.model.layers[1].self_attn.inputs[1]["hidden_states"].save()
                    )

    for length in (14, 9):
        planned = check(lambda _, saved, length=length: record(_, saved, length=length))
        assert planned.tokens == 14 * planned.rows


def test_rows_are_whole_where_a_trace_looks_inside_of_the_attention(
    check: Any, models: Any
) -> None:
    model = models("llama")

    def record(_: Any, saved: dict[str, Any]) -> None:
        for position in range(4, 14):
            with model.trace(IDS):
                model.model.layers[0].output[0][:, position] = 1.5
                saved[f"{position}"] = model.model.layers[1].self_attn.heads.z.save()
                saved[f"logits {position}"] = model.lm_head.output[0, -1].save()

    planned = check(record)
    assert planned.tokens == 14 * planned.rows

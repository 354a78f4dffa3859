"""One experiment on every family: what insitu gives is what hand-written hooks give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from insitu import LanguageModel
from support.judge import with_hooks, with_insitu
from support.tiny_models import CONFIGS, TinyModels

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = [5, 9, 17, 23, 42, 61, 7]
OTHER_IDS = [11, 3, 200, 150, 31]

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


def _blocks(family: str) -> str:
    return BLOCKS.get(family, "model.layers")


def _run_hooked(module: Any, ids: list[int], path: str, hook: Callable[..., Any]) -> torch.Tensor:
    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: torch.Tensor = module(input_ids=torch.tensor([ids])).logits
            return logits
    finally:
        handle.remove()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_patch_across_prompts_equals_hand_written_hooks(family: str, tiny: TinyModels) -> None:
    module = tiny.module(family)
    blocks = _blocks(family)
    kept = {}

    def read(_: Any, __: Any, output: Any) -> None:
        kept["hidden"] = _hidden(output)[:, -1, :].clone()

    def write(_: Any, __: Any, output: Any) -> None:
        _hidden(output)[:, -1, :] = kept["hidden"]

    expected_clean = _run_hooked(module, IDS, f"{blocks}.2", read)
    expected_patched = _run_hooked(module, OTHER_IDS, f"{blocks}.1", write)

    model = LanguageModel(str(tiny.folder(family)))
    with model.session():
        with model.trace(IDS):
            hidden = model.get(blocks)[2].output[0][:, -1, :]
            clean = model.lm_head.output.save()
        with model.trace(OTHER_IDS):
            model.get(blocks)[1].output[0][:, -1, :] = hidden
            patched = model.lm_head.output.save()

    assert torch.equal(clean, expected_clean)
    assert torch.equal(patched, expected_patched)
    assert not torch.equal(
        expected_patched, _run_hooked(module, OTHER_IDS, "lm_head", lambda *_: None)
    )


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_block_output_is_a_tuple_and_a_tensor_in_every_family(
    family: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        block = model.get(_blocks(family))[1]
        (unpacked,) = block.output
        assert block.output.shape == unpacked.shape == (1, len(IDS), 64)
        first = block.output[0].save()
        last = block.output[:, -1].save()
        doubled = (block.output * 2).save()
        whole = block.output.save()
    assert first.shape == (1, len(IDS), 64)
    assert torch.equal(first[:, -1], last)
    assert torch.equal(first * 2, doubled)
    assert torch.equal(whole[0], first)
    assert torch.equal(torch.stack([whole, whole])[0], first)
    assert torch.equal(whole[:, -1], last)


@pytest.mark.parametrize("value", ["tensor", "tuple", "in place"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_block_output_is_replaced_in_every_spelling(
    family: str, value: str, tiny: TinyModels
) -> None:
    def hook(_: Any, __: Any, output: Any) -> Any:
        hidden = _hidden(output) * 0.5
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    expected = _run_hooked(tiny.module(family), IDS, f"{_blocks(family)}.1", hook)
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        block = model.get(_blocks(family))[1]
        if value == "tensor":
            block.output = block.output[0] * 0.5
        elif value == "tuple":
            block.output = (block.output[0] * 0.5,)
        else:
            block.output[0][:] *= 0.5
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_shapes_known_while_recording_are_those_of_the_run(family: str, tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    rows = [IDS, IDS[::-1]]
    recorded = {}
    saved = {}
    with model.trace(rows):
        for module in model._description.modules:
            if module.output.HasField("tensor"):
                saved[module.path] = model.get(module.path).output.save() if module.path else None
                if module.path:
                    recorded[module.path] = saved[module.path].shape
    assert len(recorded) > 20
    for path, shape in recorded.items():
        assert saved[path].shape == shape, path


def test_rows_of_unequal_length_are_padded_on_the_left(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("gpt2")))
    with model.trace([IDS, OTHER_IDS]):
        both = model.lm_head.output.save()
    with model.trace(OTHER_IDS):
        alone = model.lm_head.output.save()
    assert both.shape[:2] == (2, len(IDS))
    torch.testing.assert_close(both[1, -len(OTHER_IDS) :], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_language_equals_hand_written_hooks_in_every_family(
    family: str, tiny: TinyModels
) -> None:
    expected = with_hooks(tiny.module(family))
    actual = with_insitu(LanguageModel(str(tiny.folder(family))))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_language_equals_hand_written_hooks_in_bfloat16(family: str, tiny: TinyModels) -> None:
    expected = with_hooks(tiny.module(family, torch.bfloat16))
    actual = with_insitu(LanguageModel(str(tiny.folder(family)), dtype=torch.bfloat16))
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.bfloat16
        torch.testing.assert_close(actual[name], tensor, rtol=1e-2, atol=1e-2, msg=name)

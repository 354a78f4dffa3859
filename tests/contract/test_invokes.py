"""Several prompts in one trace; stop, skip, edit, cache, scan, rename."""

from __future__ import annotations

import pytest
import torch

from insitu import ConfigurationError, InvalidTraceError, LanguageModel, ValueNotAvailableError
from support.tiny_models import CONFIGS, TinyModels

SHORT = [5, 9, 17]
LONG = [3, 8, 21, 34, 55]
_PATHS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def _hidden(model: LanguageModel, ids: list[int], layer: int) -> torch.Tensor:
    with model.trace(ids):
        hidden = model.blocks[layer].output[0].save()
    return hidden  # noqa: RET504 - it is there only after the block


@pytest.mark.parametrize("family", CONFIGS)
def test_each_invoke_sees_its_rows_as_if_it_ran_alone(tiny: TinyModels, family: str) -> None:
    plain = LanguageModel(str(tiny.folder(family)))
    path = next(path for path in _PATHS if path in plain._tree)
    model = LanguageModel(str(tiny.folder(family)), rename={path: "blocks"})
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            short = model.blocks[1].output[0].save()
            short_input = model.blocks[1].input.save()
        with tracer.invoke([LONG, LONG]):
            long = model.blocks[1].output[0].save()
        with tracer.invoke():
            everything = model.blocks[1].output[0].save()
    assert everything.shape[:2] == (3, 5)
    torch.testing.assert_close(short, _hidden(model, SHORT, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(short_input, _hidden(model, SHORT, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(long[:1], _hidden(model, LONG, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(everything[1:], long)


def test_writes_of_an_invoke_touch_its_rows_only(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            model.model.layers[0].output[0][:, -1] = 1
            patched = model.lm_head.output.save()
        with tracer.invoke(LONG):
            model.model.layers[1].output = model.model.layers[1].output[0] * 2
            doubled = model.lm_head.output.save()
        with tracer.invoke(LONG):
            clean = model.lm_head.output.save()
    with model.trace(SHORT):
        model.model.layers[0].output[0][:, -1] = 1
        expected_patched = model.lm_head.output.save()
    with model.trace(LONG):
        model.model.layers[1].output = model.model.layers[1].output[0] * 2
        expected_doubled = model.lm_head.output.save()
    with model.trace(LONG):
        expected_clean = model.lm_head.output.save()
    torch.testing.assert_close(patched, expected_patched, rtol=0, atol=1e-5)
    torch.testing.assert_close(doubled, expected_doubled, rtol=0, atol=1e-5)
    torch.testing.assert_close(clean, expected_clean, rtol=0, atol=1e-5)


def test_values_cross_invokes_in_both_directions_without_barriers(model: LanguageModel) -> None:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(SHORT):
            early = model.model.layers[0].output[0][:, -1]
            barrier()
        with tracer.invoke(LONG):
            barrier()
            model.model.layers[0].output[0][:, -1] = early
            late = model.model.layers[1].output[0][:, -1]
            taken = model.model.layers[0].output[0][:, -1].save()
        with tracer.invoke(SHORT):
            model.model.layers[2].output[0][:, -1] = late
            early.save()
    assert torch.equal(taken, early)


def test_a_trace_without_rows_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="needs an input"):
        with model.trace():
            pass
    with pytest.raises(InvalidTraceError, match="without a prompt"):
        with model.trace(SHORT) as tracer, tracer.invoke(LONG):
            pass


def test_positions_in_an_invoke_are_those_of_its_own_prompt(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            first = model.model.embed_tokens.output[:, 0].save()
            assert model.model.embed_tokens.output.shape == (1, 3, 64)
        with tracer.invoke(LONG):
            model.lm_head.output.save()
    assert torch.equal(first, _embedding(model, SHORT)[:, 0])


def _embedding(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with model.trace(ids):
        embedding = model.model.embed_tokens.output.save()
    return embedding  # noqa: RET504


def test_nothing_runs_after_a_stop(model: LanguageModel) -> None:
    with model.session():
        with model.trace(SHORT) as tracer:
            first = model.model.layers[0].output[0].save()
            tracer.stop()
            never = model.model.layers[2].output[0].save()
        with model.trace(SHORT):
            other = model.model.layers[0].output[0].save()
    assert torch.equal(first, other)
    with pytest.raises(ValueNotAvailableError, match="did not run"):
        never.sum()


def test_a_stop_may_hang_on_a_condition(model: LanguageModel) -> None:
    for threshold, is_stopped in ((-1e9, True), (1e9, False)):
        with model.trace(SHORT) as tracer:
            hidden = model.model.layers[0].output[0]
            with tracer.cond(hidden.max() > threshold):
                tracer.stop()
            logits = model.lm_head.output.save()
        assert (type(logits) is not torch.Tensor) == is_stopped


def test_a_skipped_layer_gives_what_it_is_told(model: LanguageModel) -> None:
    with model.trace(SHORT):
        model.model.layers[1].skip(model.model.layers[0].output)
        skipped = model.lm_head.output.save()
    with model.trace(SHORT):
        model.model.layers[1].output = model.model.layers[0].output[0]
        expected = model.lm_head.output.save()
    with model.trace(SHORT):
        clean = model.lm_head.output.save()
    assert torch.equal(skipped, expected)
    assert not torch.equal(skipped, clean)


def test_a_skip_that_comes_too_late_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="only later"):
        with model.trace(SHORT):
            model.model.layers[0].skip(model.model.layers[1].output)


def test_edits_hold_for_traces_of_the_edited_model_only(model: LanguageModel) -> None:
    with model.edit() as edited:
        hidden = model.model.layers[1].output[0]
        hidden[:, -1] = hidden[:, -1] * 2
    assert edited.model.layers[0].path == "model.layers.0"
    with model.session():
        with edited.trace(SHORT):
            changed = edited.lm_head.output.save()
        with model.trace(SHORT):
            clean = model.lm_head.output.save()
    with model.trace(SHORT):
        model.model.layers[1].output[0][:, -1] *= 2
        expected = model.lm_head.output.save()
    torch.testing.assert_close(changed, expected)
    assert not torch.equal(changed, clean)


def test_edits_in_place_stay_until_cleared(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.edit(inplace=True):
        model.model.layers[1].output[:] = 0
    with model.trace(SHORT):
        zeroed = model.model.layers[1].output[0].save()
    model.clear_edits()
    with model.trace(SHORT):
        clean = model.model.layers[1].output[0].save()
    assert zeroed.abs().sum() == 0
    assert clean.abs().sum() > 0


def test_edits_hold_for_every_invoke(model: LanguageModel) -> None:
    with model.edit() as edited:
        model.model.layers[0].output[:] *= 0
    with edited.trace() as tracer:
        with tracer.invoke(SHORT):
            one = edited.model.layers[0].output[0].save()
        with tracer.invoke(LONG):
            two = edited.model.layers[0].output[0].save()
    assert one.abs().sum() == two.abs().sum() == 0


def test_a_cache_has_what_modules_return_after_interventions(model: LanguageModel) -> None:
    with model.trace(SHORT) as tracer:
        cache = tracer.cache()
        model.model.layers[1].output[:] = 1
    assert cache["model.layers.1"].output.shape == (1, 3, 64)
    assert (cache["model.layers.1"].output == 1).all()
    assert cache["lm_head"].output.shape == (1, 3, 256)
    assert "model.layers.2.mlp.up_proj" in cache


def test_a_cache_of_chosen_modules_is_reduced_before_it_comes_back(model: LanguageModel) -> None:
    with model.trace(SHORT) as tracer:
        cache = tracer.cache(
            [model.model.layers[0], "model.layers.1.mlp"],
            include_inputs=True,
            reduce=lambda x: x[:, -1].norm(dim=-1) if x.ndim == 3 else x.float().mean(),
        )
    assert list(cache) == ["model.layers.0", "model.layers.1.mlp"]
    assert cache["model.layers.0"].output.shape == (1,)
    assert cache["model.layers.1.mlp"].input.shape == (1,)


def test_a_scan_tells_shapes_and_runs_nothing(model: LanguageModel) -> None:
    with model.scan(SHORT):
        hidden_size = model.model.layers[0].output.shape[-1]
        logits = model.lm_head.output
    assert hidden_size == 64
    assert logits.shape == (1, 3, 256)


def test_modules_have_the_further_names_that_they_are_given(tiny: TinyModels) -> None:
    rename = {"model.layers": "blocks", "self_attn": "attention", "nowhere": "else"}
    model = LanguageModel(str(tiny.folder("llama")), rename=rename)
    assert model.blocks[1].attention.q_proj.path == "model.layers.1.self_attn.q_proj"
    assert model.get("blocks.1.attention").path == "model.layers.1.self_attn"
    with pytest.raises(ConfigurationError, match="has a module 'mlp' already"):
        _ = LanguageModel(str(tiny.folder("llama")), rename={"self_attn": "mlp"}).model

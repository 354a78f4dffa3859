from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import insitu
from insitu import (
    InvalidTraceError,
    LanguageModel,
    UnknownModuleError,
    ValueNotAvailableError,
)
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def test_the_public_names_are_these() -> None:
    assert insitu.__all__ == sorted(insitu.__all__, key=lambda name: (name != "CONFIG", name))
    for name in insitu.__all__:
        assert getattr(insitu, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = insitu.nothing_such


def test_an_unknown_module_path_names_the_nearest_at_the_users_line(model: LanguageModel) -> None:
    with pytest.raises(UnknownModuleError) as raised:
        with model.trace(IDS):
            model.model.layers[0].mlpp.output.save()
    assert "model.layers.0.mlp" in str(raised.value)
    assert "self_attn" in str(raised.value)
    assert raised.value.location is not None
    assert raised.value.location.source == "model.model.layers[0].mlpp.output.save()"


def test_hasattr_works_on_envoys(model: LanguageModel) -> None:
    assert hasattr(model, "lm_head")
    assert not hasattr(model, "transformer")


def test_a_layer_out_of_range_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(UnknownModuleError, match=r"model\.layers\.3"):
        _ = model.model.layers[3]
    assert model.model.layers[-1].path == "model.layers.2"
    assert [layer.path for layer in model.model.layers[1:]] == ["model.layers.1", "model.layers.2"]


def test_the_module_tree_is_drawn_as_torch_draws_it(model: LanguageModel, tiny: TinyModels) -> None:
    assert repr(model) == repr(tiny.module("llama"))


def test_a_write_of_the_wrong_shape_is_an_error_at_the_users_line(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError) as raised:
        with model.trace(IDS):
            model.model.layers[0].output[0][:, -1, :] = torch.zeros(1, 65)
    assert raised.value.reason == "SHAPE_MISMATCH"
    assert "65" in str(raised.value)
    assert raised.value.location is not None
    assert "torch.zeros(1, 65)" in raised.value.location.source


def test_replacing_by_a_tensor_of_another_shape_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match=r"\[1, 4, 64\]") as raised:
        with model.trace(IDS):
            model.model.layers[0].output = torch.zeros(1, 4, 63)
    assert raised.value.reason == "SHAPE_MISMATCH"


def test_shapes_that_do_not_fit_each_other_are_an_error_while_recording(
    model: LanguageModel,
) -> None:
    with pytest.raises(InvalidTraceError, match=r"float32\[1, 4, 256\]") as raised:
        with model.trace(IDS):
            model.lm_head.output @ model.model.layers[0].output[0]
    assert raised.value.reason == "SHAPE_MISMATCH"


def test_an_operation_outside_the_table_names_the_nearest(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError) as raised:
        with model.trace(IDS):
            torch.fake_quantize_per_tensor_affine(model.lm_head.output, 1.0, 0, 0, 255)
    assert raised.value.reason == "UNKNOWN_OPERATION"
    assert "fake_quantize_per_tensor_affine" in str(raised.value)


def test_touching_an_unsaved_value_names_it_and_the_cure(model: LanguageModel) -> None:
    with model.trace(IDS):
        hs_29 = model.model.layers[1].output[0][:, -1, :]
    with pytest.raises(ValueNotAvailableError, match=r"'hs_29'.*\.save\(\)"):
        _ = hs_29 + 1
    assert "'hs_29'" in repr(hs_29)
    assert ".save()" in f"{hs_29}"


@pytest.mark.parametrize(
    "touch",
    [bool, int, float, torch.Tensor.tolist, torch.Tensor.numpy, np.asarray],
    ids=["bool", "int", "float", "tolist", "numpy", "asarray"],
)
def test_touching_a_value_before_the_run_names_it_and_the_cure(
    model: LanguageModel, touch: object
) -> None:
    with pytest.raises(ValueNotAvailableError, match=r"'top'.*after the block"):
        with model.trace(IDS):
            top = model.lm_head.output[0, -1].max()
            touch(top)  # type: ignore[operator]


def test_a_saved_value_is_its_tensor_to_any_code(model: LanguageModel) -> None:
    with model.trace(IDS):
        tokens = model.lm_head.output.argmax(dim=-1).save()
    assert type(tokens) is torch.Tensor
    assert tokens.shape == (1, 4)
    assert torch.stack([tokens, tokens]).shape == (2, 1, 4)
    assert tokens.numpy().tolist() == tokens.tolist()
    assert str(tokens).startswith("tensor(")
    assert int(tokens[0][-1]) in range(256)
    assert {tokens: 1}[tokens] == 1


# torch itself does not take numpy 2's `copy` yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_a_saved_value_is_drawn_by_matplotlib(model: LanguageModel) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with model.trace(IDS):
        norms = model.model.layers[1].output[0].norm(dim=-1).save()
    figure, axes = pyplot.subplots()
    axes.plot(norms[0])
    axes.imshow(norms)
    pyplot.close(figure)


def test_shape_and_dtype_are_known_while_recording(model: LanguageModel) -> None:
    with model.trace([IDS, IDS]):
        hidden = model.model.layers[1].output[0]
        assert hidden.shape == (2, 4, 64)
        assert hidden.dtype is torch.float32
        assert len(hidden) == 2
        assert hidden.size(-1) == 64
        assert [row.shape for row in hidden] == [(4, 64), (4, 64)]
        assert isinstance(hidden, torch.Tensor)


def test_helpers_of_the_user_record_what_they_do(model: LanguageModel) -> None:
    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    with model.trace(IDS):
        hidden = model.model.layers[1].output[0].save()
        result = centred(hidden).save()
    torch.testing.assert_close(result, centred(hidden), rtol=0, atol=0)


def test_a_module_value_outside_a_trace_says_so(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match=r"with model\.trace"):
        _ = model.lm_head.output


def test_a_trace_inside_a_trace_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="inside another"):
        with model.trace(IDS), model.trace(IDS):
            pass


def test_a_session_without_steps_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="no steps"):
        with model.session():
            pass


def test_an_error_in_the_block_discards_the_session_and_leaves_no_trace_open(
    model: LanguageModel,
) -> None:
    with pytest.raises(ZeroDivisionError):
        with model.session(), model.trace(IDS):
            _ = 1 / 0
    with model.trace(IDS):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)


def test_values_of_two_sessions_do_not_mix(model: LanguageModel) -> None:
    with model.trace(IDS):
        first = model.model.layers[0].output[0]
    with pytest.raises(ValueNotAvailableError, match="first"):
        with model.trace(IDS):
            model.model.layers[0].output[0][:] = first


@pytest.mark.parametrize("prompt", [[], "", [[]], [[5], []], [-1], {"ids": [1]}], ids=repr)
def test_a_prompt_that_is_none_is_refused(model: LanguageModel, prompt: object) -> None:
    with pytest.raises(InvalidTraceError, match="a prompt is text"):
        with model.trace(prompt):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ([5, 9], [[5, 9]]),
        ([[5, 9], [1]], [[5, 9], [1]]),
        (torch.tensor([[5, 9]]), [[5, 9]]),
        ({"input_ids": [[0, 5], [3, 4]], "attention_mask": [[0, 1], [1, 1]]}, [[5], [3, 4]]),
        ([torch.tensor([1, 2]), [3]], [[1, 2], [3]]),
    ],
    ids=repr,
)
def test_prompts_of_every_kind_become_rows(
    model: LanguageModel, prompt: object, rows: list[list[int]]
) -> None:
    with model.scan(prompt) as tracer:  # type: ignore[arg-type]
        assert tracer._recorder is not None
        assert tracer._recorder.trace is not None
        (invoke,) = tracer._recorder.trace.invokes
    assert [list(row.token_ids) for row in invoke.rows] == rows


def test_threads_share_a_local_model(model: LanguageModel) -> None:
    def run(_: int) -> torch.Tensor:
        with model.trace(IDS):
            tokens = model.lm_head.output.argmax(-1).save()
        return tokens  # noqa: RET504 - it is there only after the block

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(8)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_session_runs_once(model: LanguageModel) -> None:
    tracer = model.trace(IDS)
    with tracer:
        model.lm_head.output.save()
    with pytest.raises(InvalidTraceError, match="has run"):
        with tracer:
            pass


def test_out_is_refused_and_not_ignored(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match="out="):
        with model.trace(IDS):
            torch.add(model.lm_head.output, 1, out=torch.empty(1, 4, 256))


def test_an_item_goes_on_being_computed_with(model: LanguageModel) -> None:
    with model.trace(IDS):
        total = model.lm_head.output.sum().item()
        more = (total + 1).save()
        total.save()
    assert more == total + 1


def test_a_weak_reference_to_a_saved_value_is_named(model: LanguageModel) -> None:
    with pytest.raises(ValueNotAvailableError, match=r"'seen'.*weak reference"):
        with model.trace(IDS):
            seen = model.lm_head.output.save()
            watcher = weakref.ref(seen)
    assert watcher() is seen


def test_a_model_runs_on_while_an_error_of_what_it_saved_is_held(model: LanguageModel) -> None:
    """The error's traceback holds all that was running when it was raised."""
    with pytest.raises(ValueNotAvailableError) as raised, model.trace(IDS):
        seen = model.model.layers[0].output.save()
        watcher = weakref.ref(seen)
        model.lm_head.output.save()
    with model.trace(IDS):
        again = model.model.layers[0].output.save()
    assert again.shape == (1, 4, 64)
    assert raised.value.__traceback__ is not None
    assert watcher() is seen


def test_all_inputs_of_a_module_are_saved(model: LanguageModel) -> None:
    with model.trace(IDS):
        args, kwargs = model.model.layers[0].inputs.save()
    assert args[0].shape == (1, 4, 64)
    assert kwargs["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert kwargs["cache"] is None


def test_a_misspelt_assignment_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(UnknownModuleError, match="outptu"):
        model.lm_head.outptu = 1


@pytest.mark.parametrize(
    "use",
    [
        lambda model, value: setattr(model.model.layers[1], "output", value),
        lambda model, value: model.model.layers[1].skip(value),
        lambda model, value: model.lm_head(value),
        lambda model, value: insitu.list([value]),
    ],
    ids=["write", "skip", "module call", "list"],
)
def test_a_value_of_another_session_is_refused_wherever_it_is_used(
    model: LanguageModel, use: Callable[[LanguageModel, object], object]
) -> None:
    with model.trace(IDS):
        elsewhere = model.model.layers[0].output[0]
    with pytest.raises(InvalidTraceError, match="belongs to another session") as raised:
        with model.trace(IDS):
            model.lm_head.output.save()
            use(model, elsewhere)
    assert raised.value.reason == "UNKNOWN_REFERENCE"

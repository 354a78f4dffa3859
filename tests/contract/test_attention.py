"""What is in the heads of attention is what plain transformers has there, computed by hand."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from insitu import InvalidTraceError, LanguageModel, UnknownModuleError
from insitu_shard.compiler import Outline
from support.attention_judge import (
    AFTER_ROTARY,
    WITHOUT_ROTARY,
    by_hand,
    eager_module,
    projected,
    projection,
)
from support.tiny_models import CONFIGS, TinyModels

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = [5, 9, 17, 23, 42, 61, 7, 88, 101, 3, 77, 150]
OTHER_IDS = [11, 3, 200, 150, 31]
FAMILIES = sorted(CONFIGS)


def _point(family: str, name: str) -> str:
    """Gives the name under which a family has what others have after the rotation."""
    return name[0] if family in WITHOUT_ROTARY and name.endswith("rotary") else name


def _close(actual: Any, expected: Any, what: object = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"{what} {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_in_the_heads_is_that_of_eager_attention(family: str, tiny: TinyModels) -> None:
    module = eager_module(tiny, family)
    with by_hand(module) as expected, torch.no_grad():
        logits = module(input_ids=torch.tensor([IDS])).logits
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        saved = {
            (layer, name): getattr(model.blocks[layer].attn.heads, _point(family, name)).save()
            for layer in (0, 2)
            for name in AFTER_ROTARY
        }
        shapes = {key: value.shape for key, value in saved.items()}
        actual = model.unembed.output.save()
    for key, value in saved.items():
        _close(value, expected[key], key)
        assert value.shape == shapes[key]
    _close(actual, logits)
    assert saved[0, "pattern"].shape == (1, 4, len(IDS), len(IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_that_of_output_attentions(family: str, tiny: TinyModels) -> None:
    with torch.no_grad():
        plain = eager_module(tiny, family)(
            input_ids=torch.tensor([IDS]), output_attentions=True
        ).attentions
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        patterns = [block.attn.heads.pattern.save() for block in model.blocks]
    for ours, theirs in zip(patterns, plain, strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize("name", AFTER_ROTARY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_to_one_head_is_that_of_eager_attention(
    family: str, name: str, tiny: TinyModels
) -> None:
    def change(value: torch.Tensor) -> torch.Tensor:
        value[:, 3] = value[:, 1] * 0.5
        return value

    module = eager_module(tiny, family)
    with by_hand(module, {(1, name): change}), torch.no_grad():
        expected = module(input_ids=torch.tensor([IDS])).logits
    with torch.no_grad():
        unchanged = module(input_ids=torch.tensor([IDS])).logits
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        value = getattr(model.blocks[1].attn.heads, _point(family, name))
        value[:, 3] = value[:, 1] * 0.5
        in_place = model.unembed.output.save()
    with model.trace(IDS):
        heads = model.blocks[1].attn.heads
        value = getattr(heads, _point(family, name))
        order = torch.tensor([0, 1, 2, 1])
        factor = torch.tensor([1, 1, 1, 0.5])[:, None, None]
        setattr(heads, _point(family, name), value[:, order] * factor)
        replaced = model.unembed.output.save()
    _close(in_place, expected)
    _close(replaced, expected)
    assert (expected - unchanged).abs().max() > 1e-3


def _run_hooked(module: Any, hooked: Any, hook: Callable[..., Any]) -> torch.Tensor:
    handle = hooked.register_forward_hook(hook)
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=torch.tensor([IDS])).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_before_the_rotation_are_those_of_the_projections(
    family: str, name: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    module: Any = tiny.module(family)
    attention = module.get_submodule(model.blocks[1].attn.path)
    kept = {}

    def double(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        shown = projected(family, attention, name, output)
        kept["value"] = shown.clone()
        shown *= 2  # a view of the output, but of OPT's queries, which are scaled
        return output * 2 if (family, name) == ("opt", "q") else output

    expected = _run_hooked(module, projection(family, attention, name), double)
    with model.trace(IDS):
        heads = model.blocks[1].attn.heads
        value = getattr(heads, name).clone().save()
        getattr(heads, name)[:] *= 2
        logits = model.unembed.output.save()
    groups = 4 // kept["value"].shape[1]
    _close(value, kept["value"].repeat_interleave(groups, 1))
    _close(logits, expected)


def _loss(logits: Any) -> Any:
    return logits[0, -1].log_softmax(-1)[7]


def _kept(value: torch.Tensor, into: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Has a value of plain transformers take a gradient."""
    into[name] = value if value.requires_grad else value.requires_grad_()
    into[name].retain_grad()
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_the_heads_are_those_of_eager_attention(family: str, tiny: TinyModels) -> None:
    module = eager_module(tiny, family).requires_grad_(False)
    kept: dict[str, torch.Tensor] = {}
    keep = {(1, name): partial(_kept, into=kept, name=name) for name in AFTER_ROTARY}
    with by_hand(module, keep):
        _loss(module(input_ids=torch.tensor([IDS]), use_cache=False).logits).backward()
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        heads = model.blocks[1].attn.heads
        values = {name: getattr(heads, _point(family, name)) for name in AFTER_ROTARY}
        _loss(model.unembed.output).backward()
        found = {name: value.grad.save() for name, value in values.items()}
    for name, gradient in found.items():
        _close(gradient, kept[name].grad, name)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_before_the_rotation_are_those_of_the_projections(
    family: str, name: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    module: Any = tiny.module(family).requires_grad_(False)
    attention = module.get_submodule(model.blocks[1].attn.path)
    kept: dict[str, torch.Tensor] = {}

    def keep(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return _kept(output.clone(), kept, "output")

    with projection(family, attention, name).register_forward_hook(keep):
        _loss(module(input_ids=torch.tensor([IDS]), use_cache=False).logits).backward()
    expected = projected(family, attention, name, kept["output"].grad)
    # OPT scales its queries before they are shown, and the judge scales what it is given once more.
    scale = attention.scaling**2 if (family, name) == ("opt", "q") else 1
    for begins_before in (False, True):
        with model.trace(IDS):
            before, value = model.blocks[0].output[0], getattr(model.blocks[1].attn.heads, name)
            _loss(model.unembed.output).backward()
            gradient = value.grad.save()
            if begins_before:
                before.grad.save()
        # Each query head has its own part of what its key-value head is used for.
        _close(gradient.unflatten(1, (expected.shape[1], -1)).sum(2) * scale, expected)


def test_a_key_or_value_is_written_for_one_query_head_of_its_group(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.trace(IDS):
        heads = model.blocks[1].attn.heads
        before = heads.z.save()
    with model.trace(IDS):
        heads = model.blocks[1].attn.heads
        heads.k[:, 0] *= 3
        heads.v[:, 2] = 0
        after = heads.z.save()
    assert not torch.allclose(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1], before[:, 1])
    assert (after[:, 2] == 0).all()
    torch.testing.assert_close(after[:, 3], before[:, 3])


def test_only_layers_that_are_looked_at_leave_the_kernel_that_serves(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    kernel = torch.nn.functional.scaled_dot_product_attention
    num_calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        num_calls.append(1)
        return kernel(*args, **kwargs)

    with model.trace(IDS):
        model.unembed.output.save()  # loads it
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with model.trace(IDS):
        model.blocks[1].attn.heads.pattern.save()
        model.unembed.output.save()
    assert len(num_calls) == 2
    with model.trace(IDS):
        logits = model.unembed.output.save()
    assert len(num_calls) == 5
    with torch.no_grad():
        assert torch.equal(logits, tiny.module("llama")(input_ids=torch.tensor([IDS])).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi"])
def test_invokes_of_unequal_length_see_their_own_positions(family: str, tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace() as tracer:
        with tracer.invoke(OTHER_IDS):
            short = model.blocks[1].attn.heads.pattern.save()
            model.blocks[1].attn.heads.pattern[:, 2] = 0
            short_logits = model.unembed.output.save()
        with tracer.invoke(IDS):
            long = model.blocks[1].attn.heads.pattern.save()
            long_logits = model.unembed.output.save()
    with model.trace(OTHER_IDS):
        alone = model.blocks[1].attn.heads.pattern
        alone[:, 2] = 0
        alone = alone.save()
        alone_logits = model.unembed.output.save()
    with model.trace(IDS):
        other = model.blocks[1].attn.heads.pattern.save()
        other_logits = model.unembed.output.save()
    assert short.shape == (1, 4, 5, 5)
    _close(short, alone)
    _close(short_logits, alone_logits)
    _close(long, other)
    _close(long_logits, other_logits)


def _ablations(model: LanguageModel, *, exact: bool) -> list[torch.Tensor]:
    saved = []
    with model.session(exact=exact):
        for layer in range(3):
            for head in range(4):
                with model.trace(IDS):
                    heads = model.blocks[layer].attn.heads
                    heads.z[:, head] = 0
                    heads.pattern[:, (head + 1) % 4, -1, 0] = 1
                    saved.append(heads.scores[:, head, -1, :4].save())
                    saved.append(model.unembed.output[:, -1].save())
        with model.trace(IDS):
            saved.append(model.blocks[2].attn.heads.pattern.save())
    return saved


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_merged_traces_give_what_they_give_alone(family: str, tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    for ours, theirs in zip(
        _ablations(model, exact=False), _ablations(model, exact=True), strict=True
    ):
        _close(ours, theirs)


def test_an_ablation_sweep_shares_its_passes(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.session(run=False) as session:
        for head in range(4):
            with model.trace(IDS):
                model.blocks[1].attn.heads.z[:, head] = 0
                model.unembed.output[:, -1].save()
        plan = str(session.explain())
    assert "alone" not in plan


def _last_before_the_sum(module: Any, model: LanguageModel) -> Any:
    """Gives the module of block 1 whose output is added to the residual stream before the MLP."""
    block = module.get_submodule(model.blocks[1].path)
    is_normed = module.config.model_type.startswith("gemma3")
    name = model.blocks[1].attn.path.rpartition(".")[2]
    return block.get_submodule("post_attention_layernorm" if is_normed else name)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt", "mixtral", "phi3"])
def test_the_residual_stream_between_attention_and_mlp(family: str, tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    module: Any = tiny.module(family)
    block = module.get_submodule(model.blocks[1].path)
    seen: dict[str, torch.Tensor] = {}

    def enter(_: object, args: tuple[torch.Tensor, ...]) -> None:
        seen["pre"] = args[0].clone()

    def leave(_: object, __: object, output: Any) -> Any:
        added = output if isinstance(output, torch.Tensor) else output[0]
        seen["mid"] = seen["pre"] + added.view_as(seen["pre"])
        wanted = seen["mid"].clone()
        wanted[:, 2:4] *= 0.5
        new = (wanted - seen["pre"]).view_as(added)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    block.register_forward_pre_hook(enter)
    expected = _run_hooked(module, _last_before_the_sum(module, model), leave)
    with model.trace(IDS):
        middle = model.blocks[1].resid_mid.clone().save()
        model.blocks[1].resid_mid[:, 2:4] *= 0.5
        logits = model.unembed.output.save()
    with model.trace(IDS):
        wanted = model.blocks[1].resid_mid * 1
        wanted[:, 2:4] *= 0.5
        model.blocks[1].resid_mid = wanted
        replaced = model.unembed.output.save()
    _close(middle, seen["mid"])
    _close(logits, expected)
    _close(replaced, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_gradients_between_attention_and_mlp_are_those_of_plain_autograd(
    family: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    module: Any = tiny.module(family).requires_grad_(False)
    change = torch.zeros(1, len(IDS), 64, requires_grad=True)

    def add(_: object, __: object, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output + change.view_as(output)
        return (output[0] + change.view_as(output[0]), *output[1:])

    with _last_before_the_sum(module, model).register_forward_hook(add):
        _loss(module(input_ids=torch.tensor([IDS]), use_cache=False).logits).backward()
    for begins_before in (False, True):
        with model.trace(IDS):
            before, middle = model.blocks[0].output[0], model.blocks[1].resid_mid
            _loss(model.unembed.output).backward()
            gradient = middle.grad.save()
            if begins_before:
                before.grad.save()
        _close(gradient, change.grad)


def test_merged_writes_between_attention_and_mlp_are_each_traces_own(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))

    def run(*, exact: bool) -> list[torch.Tensor]:
        with model.session(exact=exact):
            saved = []
            for position in range(4):
                with model.trace(IDS):
                    model.blocks[1].resid_mid[:, position] = 0
                    saved.append(model.unembed.output[:, -1].save())
        return saved

    for ours, theirs in zip(run(exact=False), run(exact=True), strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "gpt_neox",
            "resid_mid",
            r"no module 'gpt_neox.layers.0.resid_mid'.*whose MLP takes the sum",
        ),
        ("phi", "resid_mid", "whose MLP takes the sum"),
        (
            "llama",
            "attn.heads.hook_q",
            r"heads has q, k, q_rotary, k_rotary, v, scores, pattern, z",
        ),
        ("gpt2", "attn.heads.q_rotary", r"heads has q, k, v, scores, pattern, z"),
        ("bloom", "attn.heads", r"self_attention.heads'.*read its projections"),
        ("bloom", "attn.num_heads", "no module"),
    ],
)
def test_what_a_family_does_not_have_is_refused_while_recording(
    family: str, name: str, message: str, tiny: TinyModels
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    with pytest.raises(UnknownModuleError, match=message), model.trace(IDS):
        value: Any = model.blocks[0]
        for part in name.split("."):
            value = getattr(value, part)


def test_shapes_are_checked_while_recording(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    with pytest.raises(InvalidTraceError, match=r"pattern\.output is float32\[1, 4, 12, 12\]"):
        with model.trace(IDS):
            model.blocks[0].attn.heads.pattern = torch.zeros(1, 2, 12, 12)
    with pytest.raises(InvalidTraceError, match=r"index 4 is out of bounds"):
        with model.trace(IDS):
            model.blocks[0].attn.heads.z[:, 4] = 0
    with pytest.raises(InvalidTraceError, match=r"needs .*z"):
        with model.trace(IDS):
            model.blocks[0].attn.heads.q[:] = model.blocks[0].attn.heads.z
    assert (model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim) == (4, 16)


def test_a_cache_of_all_modules_leaves_the_heads_out(tiny: TinyModels) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    with model.trace(IDS) as tracer:
        cache = tracer.cache()
    assert "model.layers.1.self_attn.q_proj" in cache
    assert not any("heads" in path or "resid" in path for path in cache)


def test_what_patterns_take_until_the_end_grows_with_the_square_of_the_length(
    tiny: TinyModels,
) -> None:
    model = LanguageModel(str(tiny.folder("llama")))
    outline = Outline.of(model._description)
    path = "model.layers.1.self_attn.heads"
    assert outline.output_bytes(f"{path}.z", is_input=False, length=100) == 4 * 16 * 4
    assert outline.output_bytes(f"{path}.pattern", is_input=False, length=100) == 4 * 100 * 4

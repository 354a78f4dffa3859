"""The heads of a loaded model, watched with plain hooks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from insitu_shard.engine import load_model
from support.tiny_models import TinyModels

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = torch.tensor([[5, 9, 17, 23, 42, 61, 7]])
POINTS = ("q", "k", "q_rotary", "k_rotary", "v", "scores", "pattern", "z")


@pytest.fixture(params=["llama", "gpt_neox", "phi"])
def module(request: pytest.FixtureRequest, tiny: TinyModels) -> Iterator[Any]:
    module = load_model("tiny", tiny.folder(request.param)).module
    with torch.no_grad():
        yield module


def _heads(module: Any) -> Any:
    return [part for path, part in module.named_modules() if path.endswith(".heads")][1]


def _generated(module: Any) -> list[int]:
    ids = module.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return ids[0].tolist()


def test_a_decode_loop_shows_the_keys_of_the_cache_too(module: Any) -> None:
    plain = _generated(module)
    shapes: dict[str, list[torch.Size]] = {name: [] for name in POINTS}
    heads = _heads(module)
    with ExitStack() as hooks:
        for name, seen in shapes.items():
            hooks.enter_context(
                getattr(heads, name).register_forward_hook(
                    lambda _, __, value, seen=seen: seen.append(value.shape)
                )
            )
        watched = _generated(module)
    assert watched == plain
    lengths = [7, 8, 9, 10, 11]
    assert [shape[-1] for shape in shapes["pattern"]] == lengths
    assert [shape[2] for shape in shapes["k_rotary"]] == lengths
    assert [shape[2] for shape in shapes["q"]] == [7, 1, 1, 1, 1]
    assert [shape[2] for shape in shapes["k"]] == [7, 1, 1, 1, 1]


def test_a_write_to_keys_and_values_leaves_the_cache_as_it_is(module: Any) -> None:
    def prefilled() -> Any:
        cache = DynamicCache(config=module.config)
        logits = module(IDS, cache=cache, use_cache=True).logits
        return logits, cache.layers[1]

    expected, kept = prefilled()
    heads = _heads(module)
    with ExitStack() as hooks:
        for name in ("k", "k_rotary", "v"):
            hooks.enter_context(
                getattr(heads, name).register_forward_hook(lambda _, __, value: value.mul_(0.5))
            )
        actual, written = prefilled()
    torch.testing.assert_close(written.keys, kept.keys)
    torch.testing.assert_close(written.values, kept.values)
    assert not torch.allclose(actual, expected, atol=1e-3)


def test_a_call_that_raises_leaves_the_module_as_it_was(module: Any) -> None:
    expected = module(IDS).logits
    heads = _heads(module)

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    with heads.scores.register_forward_hook(fail), pytest.raises(RuntimeError, match="stop here"):
        module(IDS)
    assert module.config._attn_implementation == "sdpa"
    assert torch.equal(module(IDS).logits, expected)


def test_gradients_go_through_the_heads(module: Any) -> None:
    names = ("q_rotary", "v", "pattern", "z")
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: object, __: object, value: torch.Tensor) -> None:
            value.retain_grad()
            kept[name] = value

        return hook

    heads = _heads(module)
    with torch.enable_grad(), ExitStack() as hooks:
        for name in names:
            point = getattr(heads, name)
            hooks.enter_context(point.register_forward_hook(keep(name)))
        embedded = module.get_input_embeddings()(IDS).requires_grad_()
        module(inputs_embeds=embedded).logits[0, -1].max().backward()
    for name in names:
        assert kept[name].grad is not None
        assert kept[name].grad.abs().max() > 0

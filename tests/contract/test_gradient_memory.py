"""What a graph keeps in memory: counted, bounded before it runs, and less with checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import insitu
from insitu import LanguageModel
from insitu_shard.compiler import Limits
from insitu_shard.engine.explain import explain

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.tiny_models import TinyModels

IDS = list(range(3, 67))


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def kept_by(run: Callable[[], Any]) -> int:
    """Counts the bytes that graphs keep while something runs, each memory once."""
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor.detach(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept.values())


def _gradient_at(model: LanguageModel, layer: int, **options: bool) -> torch.Tensor:
    with model.session(**options), model.trace(IDS):
        hidden = model.blocks[layer].output[0]
        model.unembed.output[0, -1].log_softmax(-1)[7].backward()
        found = [hidden.grad.save()]
    return found[0]


def _plain_gradient_at(module: Any, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def begin(_: Any, __: Any, result: Any) -> Any:
        hidden = (result[0] if isinstance(result, tuple) else result).detach().requires_grad_()
        seen.append(hidden)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    hook = module.model.layers[layer].register_forward_hook(begin)
    logits = module.requires_grad_(False)(torch.tensor([IDS]), use_cache=False).logits
    hook.remove()
    return torch.autograd.grad(logits[0, -1].log_softmax(-1)[7], seen)[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_graph_keeps_no_more_than_that_of_plain_autograd(
    tiny: TinyModels, model: LanguageModel, layer: int
) -> None:
    module = tiny.module("llama")
    plain = kept_by(lambda: _plain_gradient_at(module, layer))
    hidden = 64 * len(IDS) * 4
    assert kept_by(lambda: _gradient_at(model, layer)) <= plain + 2 * hidden


def test_what_comes_before_a_parameter_keeps_nothing(model: LanguageModel) -> None:
    def train(layer: int) -> None:
        with model.session() as session:
            vector = session.parameter(torch.zeros(64))
            with model.trace(IDS):
                model.blocks[layer].output[:] += vector
                model.unembed.output.sum().backward()
                vector.grad.save()

    late, early = kept_by(lambda: train(2)), kept_by(lambda: train(0))
    assert late < early / 2
    assert not kept_by(lambda: _reading_parameters(model))


def _reading_parameters(model: LanguageModel) -> None:
    with model.session() as session:
        vector = session.parameter(torch.zeros(64))
        with model.trace(IDS):
            model.blocks[0].output[:] += vector
            model.unembed.output.save()


def test_checkpoints_keep_less_and_give_the_same(model: LanguageModel) -> None:
    found: list[torch.Tensor] = []
    whole = kept_by(lambda: found.append(_gradient_at(model, 0)))
    less = kept_by(lambda: found.append(_gradient_at(model, 0, checkpoint=True)))
    assert torch.equal(*found)
    assert less < whole / 2


def test_layers_that_are_looked_into_keep_what_is_beside(model: LanguageModel) -> None:
    """A LoRA in every attention, with several backward passes: the MLPs are checkpointed."""

    def train(**options: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with model.session(**options) as session:
            changes = session.lora([block.attn.q_proj for block in model.blocks], rank=2)
            optimizer = insitu.optim.SGD(changes.parameters(), lr=1.0)
            for _ in range(2):
                with model.trace(IDS):
                    changes()
                    logits = model.unembed.output
                    logits[0, -1].log_softmax(-1)[7].backward()
                    logits[0, -2].log_softmax(-1)[8].backward()
                optimizer.step()
            state = changes.state_dict().save()
        return list(state.values())

    found: list[list[torch.Tensor]] = []
    whole = kept_by(lambda: found.append(train()))
    less = kept_by(lambda: found.append(train(checkpoint=True)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert less < 0.8 * whole


def test_a_graph_that_is_too_large_is_refused_before_it_runs(model: LanguageModel) -> None:
    def planned(max_bytes: int, **options: bool) -> str:
        with model.session(run=False, **options) as session, model.trace(IDS):
            hidden = model.blocks[0].output[0]
            model.unembed.output[0, -1].sum().backward()
            hidden.grad.save()
        limits = Limits(max_graph_bytes=max_bytes)
        descriptions = {model.name: model._description}
        return str(explain(session._recorder.session, descriptions, (), limits))

    kept = kept_by(lambda: _gradient_at(model, 0))
    assert "1 trace in 1 pass" in planned(kept * 2)
    assert "keep about" not in planned(kept * 2)
    assert "keep about" in planned(kept // 2)
    assert "open the session with checkpoint=True" in planned(1000)
    assert "keep about" in planned(1000, checkpoint=True)

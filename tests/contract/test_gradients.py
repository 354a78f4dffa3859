"""Gradients of hidden values, against plain autograd with hooks written by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch

from insitu import InterventionError, InvalidTraceError, LanguageModel
from support.tiny_models import CONFIGS, TinyModels

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = [5, 9, 17, 23]
OTHER = [6, 3, 88, 41]
LONGER = [6, 3, 88, 41, 9, 102]
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


class ByHand:
    """A model in plain transformers whose layers' outputs take gradients."""

    def __init__(self, tiny: TinyModels, family: str) -> None:
        self.module = tiny.module(family).requires_grad_(False)
        self.layers = self.module.get_submodule(LAYERS.get(family, "model.layers"))

    def run(
        self,
        rows: list[list[int]],
        loss: Callable[[torch.Tensor], torch.Tensor],
        change: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, hidden: hidden,
    ) -> list[torch.Tensor]:
        """Gives the gradients at the layers' outputs, after they were changed."""
        seen: list[torch.Tensor] = []

        def hook(number: int) -> Any:
            def keep(_: object, __: object, result: Any) -> Any:
                hidden = result[0] if isinstance(result, tuple) else result
                if not hidden.requires_grad:
                    hidden = hidden.detach().requires_grad_()
                hidden = change(number, hidden.clone())
                hidden.retain_grad()
                seen.append(hidden)
                return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

            return keep

        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_hook(hook(number)).remove)
            loss(self.module(torch.tensor(rows), use_cache=False).logits).backward()
        return [hidden.grad for hidden in seen if hidden.grad is not None]


def _loss(logits: Any) -> Any:
    return logits[0, -1].log_softmax(-1)[7]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_gradients_at_every_layer_are_those_of_plain_autograd(
    tiny: TinyModels, family: str
) -> None:
    model = LanguageModel(str(tiny.folder(family)))
    with model.trace(IDS):
        hidden = [block.output[0] for block in model.blocks]
        _loss(model.unembed.output).backward()
        found = [at.grad.save() for at in hidden]
    for one, other in zip(found, ByHand(tiny, family).run([IDS], _loss), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_gradients_are_of_what_was_written(tiny: TinyModels, model: LanguageModel) -> None:
    def change(number: int, hidden: torch.Tensor) -> torch.Tensor:
        if number == 1:
            hidden[:, -1] = hidden[:, 0] * 2
        return hidden

    with model.trace(IDS):
        hidden = [block.output[0] for block in model.blocks]
        hidden[1][:, -1] = hidden[1][:, 0] * 2
        _loss(model.lm_head.output).backward()
        found = [at.grad.save() for at in hidden]
    for one, other in zip(found, ByHand(tiny, "llama").run([IDS], _loss, change), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("others", [OTHER, LONGER], ids=["of one length", "of another length"])
def test_each_invoke_has_the_gradients_of_its_rows(
    others: list[int], tiny: TinyModels, model: LanguageModel
) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = model.model.layers[0].output[0]
            one = model.lm_head.output[0, -1].log_softmax(-1)[7]
        with tracer.invoke(others):
            second = model.model.layers[0].output[0]
            other = model.lm_head.output[0, -1].log_softmax(-1)[7]
        (one + other).backward()
        found = [first.grad.save(), second.grad.save()]
    for gradient, ids in zip(found, (IDS, others), strict=True):
        expected = ByHand(tiny, "llama").run([ids], _loss)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_several_backward_passes_each_have_their_own_gradients(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[1].output[0]
        logits = model.lm_head.output[0, -1]
        logits[3].backward(retain_graph=True)
        first = hidden.grad.save()
        with logits[4].backward():
            second = hidden.grad.save()
        again = hidden.grad.save()
        (logits[3] + logits[4]).backward()
        both = hidden.grad.save()
        logits.backward(torch.nn.functional.one_hot(torch.tensor(4), 256).float())
        by_vector = hidden.grad.save()
    assert torch.equal(first, again)
    assert torch.allclose(first + second, both, atol=1e-6)
    assert torch.allclose(second, by_vector, atol=1e-6)
    assert not torch.allclose(first, second)


def test_gradients_by_what_the_trace_itself_makes(tiny: TinyModels, model: LanguageModel) -> None:
    """A steering vector has the sum of the gradients at the places where it was added."""
    with model.trace(IDS):
        vector = torch.zeros(64)
        hidden = model.model.layers[1].output[0]
        hidden[:] = hidden + vector
        _loss(model.lm_head.output).backward()
        by_vector = vector.grad.save()
        at_layer = hidden.grad.save()
    assert torch.allclose(by_vector, at_layer.sum((0, 1)), atol=1e-6)
    assert torch.allclose(at_layer, ByHand(tiny, "llama").run([IDS], _loss)[1], atol=1e-6)


def test_inputs_and_inner_modules_have_gradients(model: LanguageModel) -> None:
    with model.trace(IDS):
        embedded = model.model.embed_tokens.output
        entering = model.model.layers[0].input
        inner = model.model.layers[1].mlp.act_fn.output
        inner[:] = inner * 2
        attention = model.model.layers[1].self_attn.output[0]
        _loss(model.lm_head.output).backward()
        found = [at.grad.save() for at in (embedded, entering, inner, attention)]
    assert torch.allclose(found[0], found[1])
    assert all(at.abs().sum() > 0 for at in found)


def test_gradients_are_used_in_later_traces_and_beside_other_traces(model: LanguageModel) -> None:
    """Attribution patching: the change that a gradient foretells."""
    with model.session():
        with model.trace(OTHER):
            clean = model.model.layers[1].output[0]
            clean_loss = _loss(model.lm_head.output).save()
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
            loss = _loss(model.lm_head.output).save()
            loss.backward()
            foretold = (hidden.grad * (clean - hidden)).sum().save()
            step = hidden.grad * 1e-3
        with model.trace(IDS):
            model.model.layers[1].output[0][:] += step
            stepped = _loss(model.lm_head.output).save()
    assert stepped > loss
    assert foretold.isfinite()
    assert clean_loss.isfinite()


def test_what_was_saved_before_is_the_same_with_and_without_gradients(model: LanguageModel) -> None:
    with model.trace(IDS):
        plain = model.lm_head.output.save()
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        logits = model.lm_head.output.save()
        logits.sum().backward()
        hidden.grad.save()
    assert torch.equal(plain, logits)


def test_a_value_that_the_loss_does_not_depend_on_is_an_error_at_its_line(
    model: LanguageModel,
) -> None:
    with pytest.raises(InterventionError, match=r"hidden\.grad\[:, -1\]") as caught:
        with model.trace(IDS):
            part = model.model.layers[0].output[0][:, -1]
            model.lm_head.output.sum().backward()
            part.grad.save()
    assert "part.grad" in str(caught.value)


def test_misuse_is_an_error_at_the_users_line(model: LanguageModel) -> None:
    hidden = None

    def before_backward() -> None:
        with model.trace(IDS):
            model.model.layers[0].output[0].grad.save()

    def of_many_elements() -> None:
        with model.trace(IDS):
            model.lm_head.output.backward()

    def of_integers() -> None:
        with model.trace(IDS):
            model.lm_head.output.argmax(-1).sum().backward()

    def of_another_trace() -> None:
        nonlocal hidden
        with model.session():
            with model.trace(IDS):
                hidden = model.model.layers[0].output[0]
            with model.trace(IDS):
                model.lm_head.output.sum().backward()
                hidden.grad.save()

    def second_order() -> None:
        with model.trace(IDS):
            model.lm_head.output.sum().backward(create_graph=True)

    def write_after_the_pass() -> None:
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            with model.lm_head.output.sum().backward():
                gradient = hidden.grad
            gradient[:] = 0

    def write_of_another_shape() -> None:
        with model.trace(IDS):
            hidden = model.model.layers[0].output[0]
            model.lm_head.output.sum().backward()
            hidden.grad = torch.zeros(3)

    for misuse, message in (
        (before_backward, "before any backward pass"),
        (of_many_elements, r"which is \[1, 4, 256\]; reduce it"),
        (of_integers, "only floating-point values have gradients"),
        (of_another_trace, "outside the trace that makes it"),
        (second_order, "create_graph"),
        (write_after_the_pass, "after its backward pass was over"),
        (write_of_another_shape, r"\[1, 4, 64\] and can not be replaced by a tensor of \[3\]"),
    ):
        with pytest.raises(InvalidTraceError, match=message) as caught:
            misuse()
        assert "test_gradients.py" in str(caught.value)


class Rewriting:
    """A model in plain transformers whose backward pass goes on with other gradients."""

    def __init__(self, tiny: TinyModels) -> None:
        self._by_hand = ByHand(tiny, "llama")

    def run(self, changes: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> Any:
        """Gives the gradients of all layers, with changes at some."""

        def change(number: int, hidden: torch.Tensor) -> torch.Tensor:
            if number in changes:
                hidden.register_hook(changes[number])
            return hidden

        return self._by_hand.run([IDS], _loss, change)


def test_a_written_gradient_is_what_the_pass_goes_on_with(
    tiny: TinyModels, model: LanguageModel
) -> None:
    def knocked_out(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:, 1] = 0
        return gradient

    with model.trace(IDS):
        hidden = [block.output[0] for block in model.blocks]
        with _loss(model.unembed.output).backward():
            before = hidden[0].grad.save()
            hidden[2].grad = hidden[2].grad * 2
            hidden[1].grad[:, 1] = 0
            found = [at.grad.save() for at in hidden]
        with _loss(model.unembed.output).backward():
            again = hidden[0].grad.save()
    plain = Rewriting(tiny).run({})
    expected = Rewriting(tiny).run({2: lambda gradient: gradient * 2, 1: knocked_out})
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(before, plain[0], atol=1e-6)
    assert torch.allclose(again, plain[0], atol=1e-6)
    assert not torch.allclose(found[0], plain[0], atol=1e-3)


def test_a_gradient_is_changed_in_part_and_in_place(tiny: TinyModels, model: LanguageModel) -> None:
    with model.trace(IDS):
        first, second = (block.output[0] for block in model.blocks[:2])
        _loss(model.unembed.output).backward()
        gradient = second.grad
        gradient[0][-1].mul_(3)
        gradient *= 0.5
        second.grad += 0.25
        found = [first.grad.save(), second.grad.save()]

    def changed(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, -1] *= 3
        return gradient * 0.5 + 0.25

    expected = Rewriting(tiny).run({1: changed})
    for one, other in zip(found, expected, strict=False):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_is_written_holds_for_the_loss_of_its_pass_alone(model: LanguageModel) -> None:
    with model.trace(IDS):
        first, second = (block.output[0] for block in model.blocks[:2])
        logits = model.unembed.output[0, -1]
        logits[3].backward()
        plain = first.grad.save()
        second.grad = torch.zeros_like(second)
        nothing = first.grad.save()
        logits[3].backward()
        again = first.grad.save()
    assert torch.equal(plain, again)
    assert not nothing.any()


def test_gradients_are_taken_between_traces(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.blocks[0].output[0][0]
        shifted = hidden * 2
        loss = (shifted**2).sum()
        loss.backward()
        gradient = shifted.grad.save()
        hidden.save()
    assert torch.allclose(gradient, 4 * hidden)

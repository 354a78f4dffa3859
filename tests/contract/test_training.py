"""Training inside a session, against plain torch, and peft for LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import insitu
from insitu import InterventionError, LanguageModel
from support import training_cases as cases

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from insitu import Session
    from support.tiny_models import TinyModels

ATOL = 1e-4
IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def _assert_same(actual: cases.Trained, expected: cases.Trained) -> None:
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        assert not actual[name].requires_grad
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=ATOL, msg=name)


def test_a_probe_is_that_of_plain_torch(tiny: TinyModels, model: LanguageModel) -> None:
    _assert_same(cases.probe(model), cases.plain_probe(tiny.module("llama")))


def test_a_steering_vector_over_a_recorded_loop_is_that_of_plain_torch(
    tiny: TinyModels, model: LanguageModel
) -> None:
    trained = cases.steering(model)
    _assert_same(trained, cases.plain_steering(tiny.module("llama")))
    assert trained["losses"][-2:].sum() < trained["losses"][:2].sum()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks it so
def test_a_lora_is_that_of_peft(tiny: TinyModels, model: LanguageModel) -> None:
    trained = cases.lora(model)
    _assert_same(trained, cases.plain_lora(tiny.module("llama"), trained))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks it so
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("gpt_neox", ["query_key_value", "dense", "dense_4h_to_h"]),
        ("opt", ["k_proj", "fc1", "fc2"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gemma3", ["o_proj", "gate_proj"]),
        ("mixtral", ["q_proj", "o_proj"]),
    ],
)
def test_a_lora_fits_the_linear_modules_of_every_family(
    family: str, names: list[str], tiny: TinyModels
) -> None:
    trained = cases.lora(LanguageModel(str(tiny.folder(family))), names=names, steps=6)
    expected = cases.plain_lora(tiny.module(family), trained, names=names, steps=6)
    _assert_same(trained, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks it so
def test_a_lora_is_loaded_by_peft_and_generates_the_same(
    tiny: TinyModels, model: LanguageModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel

    torch.manual_seed(3)
    with model.session() as session:
        changes = session.lora([block.attn.q_proj for block in model.blocks], rank=2, alpha=4)
        optimizer = insitu.optim.Adam(changes.parameters(), lr=0.1)
        for _ in range(3):
            with model.trace(IDS):
                changes()
                model.unembed.output[0, -1].log_softmax(-1)[7].backward()
            optimizer.step()
            optimizer.zero_grad()
        with model.trace(IDS):
            changes()
            logits = model.unembed.output.save()
        with model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None) as tracer:
            for _ in tracer.iter[:]:
                changes()
            ids = tracer.result.save()
        state = changes.state_dict().save()
    save_file(dict(state), tmp_path / "adapter_model.safetensors")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    module: Any = tiny.module("llama")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    unchanged = module.generate(torch.tensor([IDS]), **options)
    adapted: Any = PeftModel.from_pretrained(module, tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor([IDS])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, adapted.generate(input_ids=torch.tensor([IDS]), **options))
    assert not torch.equal(ids, unchanged)


def _quadratic(parameter: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    return ((parameter - aim) ** 2).sum()


_AIM = torch.tensor([1.0, -2.0, 3.0])
_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.2}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.3, "weight_decay": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), _OPTIMIZERS, ids=str)
def test_every_optimizer_is_that_of_torch(
    model: LanguageModel, name: str, options: dict[str, Any]
) -> None:
    """Between traces, with gradients that add up, a schedule and parameters that are left out."""

    def train(optimizers: Any, parameters: list[Any], steps: Any) -> None:
        one, two, unused = parameters
        groups = [{"params": [one, unused]}, {"params": [two], "weight_decay": 0.3}]
        optimizer = getattr(optimizers, name)(groups, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        for number in steps:
            _quadratic(one, _AIM).backward()
            (one * two).sum().backward()
            optimizer.step()
            schedule.step()
            if number % 2:
                optimizer.zero_grad(set_to_none=number > 2)

    start = [torch.ones(3), torch.arange(3.0), torch.full((2,), 5.0)]
    with model.session() as session:
        parameters = [session.parameter(tensor) for tensor in start]
        train(insitu.optim, parameters, range(5))
        found = [parameter.save() for parameter in parameters]
    plain = [tensor.clone().requires_grad_() for tensor in start]
    train(torch.optim, plain, range(5))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], start[2])
    assert torch.equal(start[0], torch.ones(3))


def test_values_are_as_of_where_they_are_defined(model: LanguageModel) -> None:
    with model.session() as session:
        parameter = session.parameter(torch.ones(64))
        optimizer = insitu.optim.SGD([parameter], lr=1.0)
        with model.trace(IDS):
            doubled = parameter * 2
            before = parameter.save()
            view = parameter.view(8, 8)
            late = (model.unembed.output.sum() * 0 + parameter).save()
            parameter.sum().backward()
            gradient = parameter.grad.save()
            optimizer.step()
            after = parameter.save()
            late_after = (model.unembed.output.sum() * 0 + parameter).save()
        parameter.sum().backward()
        added = parameter.grad.save()
        parameter.grad = parameter.grad * 0.5
        optimizer.step()
        last = parameter.save()
        parameter.update(torch.full((64,), 7.0))
        updated = parameter.save()
        doubled.save()
        view.save()
    assert torch.equal(before, torch.ones(64))
    assert torch.equal(late, torch.ones(64))
    assert torch.equal(doubled, torch.full((64,), 2.0))
    assert torch.equal(view, torch.ones(8, 8))
    assert torch.equal(gradient, torch.ones(64))
    assert torch.equal(after, torch.zeros(64))
    assert torch.equal(late_after, torch.zeros(64))
    assert torch.equal(added, torch.full((64,), 2.0))
    assert torch.equal(last, torch.full((64,), -1.0))
    assert torch.equal(updated, torch.full((64,), 7.0))


def test_traces_beside_a_trained_one_see_its_steps_in_order(model: LanguageModel) -> None:
    """What could run early must not, and the same session gives the same again."""

    def run(**options: bool) -> list[torch.Tensor]:
        with model.session(**options) as session:
            vector = session.parameter(torch.zeros(64))
            optimizer = insitu.optim.SGD([vector], lr=1.0)
            seen = []
            for _ in range(3):
                with model.trace(IDS):
                    model.blocks[0].output[:] += vector
                    seen.append(model.unembed.output[0, -1].save())
                with model.trace(IDS):
                    model.blocks[0].output[:] += vector
                    model.unembed.output[0, -1].log_softmax(-1)[7].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return seen

    merged, alone = run(), run(exact=True)
    for one, other in zip(merged, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, run(), merged))
    assert not torch.allclose(merged[0], merged[1], atol=1e-2)


def test_what_does_not_run_does_not_train(model: LanguageModel) -> None:
    with model.session() as session:
        parameter = session.parameter(torch.zeros(2))
        optimizer = insitu.optim.SGD([parameter], lr=1.0)
        with session.iter([1.0, -1.0, 2.0]) as item:
            with session.cond(item > 0):
                (parameter.sum() * item).backward()
                optimizer.step()
                optimizer.zero_grad()
        result = parameter.save()
    assert torch.equal(result, torch.full((2,), -3.0))


def test_explain_says_that_a_trace_trains(model: LanguageModel) -> None:
    with model.session(run=False) as session:
        vector = session.parameter(torch.zeros(64))
        for _ in range(2):
            with model.trace(IDS):
                model.blocks[0].output[:] += vector
                model.unembed.output.sum().backward()
    assert "it trains parameters" in str(session.explain())


def _rated(session: Session, **options: object) -> object:
    return insitu.optim.Adam([session.parameter(torch.zeros(2))], **options)


_PLAIN = torch.zeros(2, requires_grad=True)
_MISUSES: list[tuple[Callable[[Session, LanguageModel], object], str]] = [
    (lambda s, _: s.parameter(torch.tensor([1, 2])), "floating-point elements, and not torch.int"),
    (lambda s, _: torch.optim.SGD([s.parameter(_PLAIN)], lr=1), r"same name in insitu\.optim"),
    (lambda s, _: insitu.optim.SGD([_PLAIN], lr=0.1), "trains its parameters, and not a Tensor"),
    (lambda s, _: insitu.optim.SGD([], lr=0.1), "needs parameters"),
    (lambda s, _: _rated(s, lr=-1), "Invalid learning rate: -1"),
    (lambda s, _: _rated(s, betas=(0.5, 1.5)), "Invalid beta"),
    (lambda s, _: _rated(s, lr=float("inf")), "lr of Adam is inf; use a number, 0 or more"),
    (lambda s, _: _rated(s, foreach=True), "foreach=True does not run inside a session"),
    (lambda s, _: s.parameter(_PLAIN).mul_(2), r"parameter\.update\(value\)"),
    (lambda s, _: s.parameter(_PLAIN).update(torch.ones(3)), "can not be replaced"),
    (lambda s, _: s.trainable(torch.nn.ReLU()), "no parameter that requires a gradient"),
    (lambda s, model: s.lora(model.model.layers), "no LoRA fits it"),
    (lambda s, model: s.lora(model.model.layers[0].mlp.up_proj, rank=0), "use a whole number"),
]


@pytest.mark.parametrize(("misuse", "message"), _MISUSES, ids=[at for _, at in _MISUSES])
def test_misuse_is_an_error_at_the_users_line(
    model: LanguageModel, misuse: Callable[[Session, LanguageModel], object], message: str
) -> None:
    with pytest.raises(insitu.Error, match=message) as caught:
        with model.session(run=False) as session:
            misuse(session, model)
    assert "test_training.py" in str(caught.value)


def test_what_shows_only_when_it_runs_is_an_error_at_its_line(model: LanguageModel) -> None:
    def without_a_gradient(session: Session) -> None:
        session.parameter(torch.zeros(2)).grad.save()

    def of_nothing_trained(session: Session) -> None:
        parameter = session.parameter(torch.zeros(2))
        with model.trace(IDS):
            (parameter * 2).save()
            model.unembed.output.sum().backward()

    for misuse, message in (
        (without_a_gradient, "this parameter has no gradient"),
        (of_nothing_trained, "the loss depends on no parameter"),
    ):
        with pytest.raises(InterventionError, match=message) as caught:
            with model.session() as session:
                misuse(session)
        assert "test_training.py" in str(caught.value)

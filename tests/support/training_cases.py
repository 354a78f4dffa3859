"""A probe, a steering vector and a LoRA, trained in a session and in plain torch, peft for LoRA."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import insitu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu import LanguageModel

STEPS = 50
BATCHES = [[[5, 9, 17, 23], [6, 3, 88, 41]], [[200, 7, 150, 31], [42, 61, 7, 8]]]
LABELS = torch.tensor([[0, 2], [1, 0]])
RANK, ALPHA = 4, 8
LLAMA_LINEAR = ("q_proj", "v_proj", "down_proj")

Trained = dict[str, torch.Tensor]


def new_probe() -> torch.nn.Module:
    """Gives a probe that is the same at each call."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))


def probe(model: LanguageModel, *, remote: bool = False) -> Trained:
    """Trains a probe on the last position of a layer."""
    with model.session(remote=remote) as session:
        trained = session.trainable(new_probe())
        optimizer = insitu.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(STEPS):
            with model.trace(BATCHES[step % 2]):
                answer = trained(model.blocks[1].output[:, -1])
                loss = functional.cross_entropy(answer, LABELS[step % 2])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        last = loss.save()
        state = trained.state_dict().save()
    return {**state, "loss": last}


def plain_probe(module: Any) -> Trained:
    """The same in plain torch."""
    trained, seen = new_probe(), {}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
    hook = module.model.layers[1].register_forward_hook(
        lambda _, __, result: seen.update(hidden=_hidden(result))
    )
    for step in range(STEPS):
        with torch.no_grad():
            module(input_ids=torch.tensor(BATCHES[step % 2]), use_cache=False)
        loss = functional.cross_entropy(trained(seen["hidden"][:, -1]), LABELS[step % 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    return {**trained.state_dict(), "loss": loss.detach()}


def steering(model: LanguageModel, *, remote: bool = False) -> Trained:
    """Trains a vector that is added to a layer, over data that a recorded loop runs over."""
    with model.session(remote=remote) as session:
        vector = session.parameter(torch.zeros(64))
        optimizer = insitu.optim.SGD([vector], lr=0.01, momentum=0.9, nesterov=True)
        losses = insitu.list().save()
        with session.iter(torch.tensor(BATCHES * 5)) as rows:
            with model.trace(rows):
                model.blocks[1].output[:] += vector
                loss = -model.unembed.output[:, -1].log_softmax(-1)[:, 7].mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        result = vector.save()
    return {"vector": result, "losses": torch.stack(list(losses))}


def plain_steering(module: Any) -> Trained:
    """The same in plain torch."""
    vector = torch.zeros(64, requires_grad=True)
    optimizer = torch.optim.SGD([vector], lr=0.01, momentum=0.9, nesterov=True)
    losses = []

    def add(_: Any, __: Any, result: Any) -> Any:
        hidden = _hidden(result) + vector
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    with ExitStack() as hooks:
        hooks.callback(module.model.layers[1].register_forward_hook(add).remove)
        module.requires_grad_(False)
        for rows in BATCHES * 5:
            logits = module(input_ids=torch.tensor(rows), use_cache=False).logits
            loss = -logits[:, -1].log_softmax(-1)[:, 7].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return {"vector": vector.detach(), "losses": torch.stack(losses)}


def lora(
    model: LanguageModel,
    *,
    remote: bool = False,
    names: Sequence[str] = LLAMA_LINEAR,
    steps: int = STEPS,
) -> Trained:
    """Trains a LoRA on linear modules of every layer, with the gradients of two batches a step."""
    torch.manual_seed(2)
    with model.session(remote=remote) as session:
        paths = [module.path for module in model._tree.modules]
        modules = [model.get(path) for path in paths if path.rpartition(".")[2] in names]
        changes = session.lora(modules, rank=RANK, alpha=ALPHA)
        start = changes.state_dict().save()
        optimizer = insitu.optim.Adam(changes.parameters(), lr=5e-3, betas=(0.9, 0.95))
        for step in range(steps):
            with model.trace(BATCHES[step % 2]):
                changes()
                logits = model.unembed.output
                ids = torch.tensor(BATCHES[step % 2])
                loss = (
                    functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / 2
                )
                loss.backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
                session.log("step", step, "loss", loss)
        result = changes.state_dict().save()
        last = loss.save()
    return {
        **{f"start {name}": value for name, value in start.items()},
        **result,
        "loss": last,
    }


def plain_lora(
    module: Any, start: Trained, *, names: Sequence[str] = LLAMA_LINEAR, steps: int = STEPS
) -> Trained:
    """The same with peft, from the same start."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(names),
        fan_in_fan_out=module.config.model_type == "gpt2",
    )
    adapted = get_peft_model(module, config)
    parameters = {
        name.replace(".default", ""): each
        for name, each in adapted.named_parameters()
        if each.requires_grad
    }
    assert {f"start {name}" for name in parameters} == {n for n in start if n.startswith("start")}
    with torch.no_grad():
        for name, each in parameters.items():
            each.copy_(start[f"start {name}"])
    optimizer = torch.optim.Adam(parameters.values(), lr=5e-3, betas=(0.9, 0.95))
    for step in range(steps):
        ids = torch.tensor(BATCHES[step % 2])
        logits = adapted(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / 2
        loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    trained = {name: each.detach() for name, each in parameters.items()}
    return {**trained, "loss": loss.detach()}


def _hidden(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result

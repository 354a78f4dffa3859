"""What a rank of a group does to see whether a model that is split shows itself as a whole one.

Every rank records and runs the same sessions on a model that is split and on one that is not.
"""

from __future__ import annotations

import random
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import insitu
from insitu import LanguageModel
from insitu_shard import engine
from support.judge import with_insitu
from support.random_sessions import run
from support.same_merged import is_there, plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_shard.engine.ranks import Ranks

IDS = [5, 9, 17, 23, 42, 61, 7]
TOLERANCE = 2e-5
WHOLE_ON_EACH_RANK = ("opt", "gptj")


def split_model(folder: Path, ranks: Ranks) -> LanguageModel:
    """Gives a model that is split over the ranks, in this process."""
    model = LanguageModel(str(folder))
    model._local.__dict__["_model"] = engine.load_model(str(folder), folder, ranks=ranks)
    return model


def differences(
    ranks: Ranks, folders: dict[str, Path], sessions: dict[str, list[Any]]
) -> dict[str, list[str]]:
    """Runs all cases on all models; gives what differed of each, by model."""
    found = {}
    for name, folder in folders.items():
        whole, split = LanguageModel(str(folder)), split_model(folder, ranks)
        found[name] = _of_model(whole, split, sessions[name])
        if name not in WHOLE_ON_EACH_RANK and _share(whole, split) > 0.75:
            found[name].append(f"a rank has {_share(whole, split)} of the weights")
    return found


def _share(whole: LanguageModel, split: LanguageModel) -> float:
    """Gives how much of the weights a rank has."""
    of_rank, of_all = (
        sum(_local(parameter).numel() for parameter in model._local._model.module.parameters())
        for model in (split, whole)
    )
    return of_rank / of_all


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _of_model(whole: LanguageModel, split: LanguageModel, sessions: list[Any]) -> list[str]:
    found = _compared("everywhere", everywhere, whole, split)
    found += _compared("heads", heads, whole, split)
    found += _compared("recorded gradients", recorded_gradients, whole, split)
    found += _compared("gradients taken together", gradients_together, whole, split)
    found += _compared("a trained vector", trained_vector, whole, split)
    found += _compared("the judge's experiment", with_insitu, whole, split)
    found += _compared("generations", generations, whole, split)
    for number, description in enumerate(sessions):
        for options in ({}, {"exact": True}):

            def run_one(model: LanguageModel, d: Any = description, o: Any = options) -> Any:
                outcome = run(model, d, **o)
                return {**outcome.values, "error": str(outcome.error)}

            found += _compared(f"session {number} {options}: {description}", run_one, whole, split)
    return found


def _compared(
    name: str, use: Callable[[LanguageModel], Any], whole: LanguageModel, split: LanguageModel
) -> list[str]:
    try:
        actual, expected = use(split), use(whole)
    except Exception:  # noqa: BLE001 - it is told by the test
        return [f"{name}: {traceback.format_exc(limit=-6)}"]
    if actual.keys() != expected.keys():
        return [f"{name}: {actual.keys() ^ expected.keys()}"]
    return [
        f"{name}, {key}: {difference}"
        for key, value in expected.items()
        if (difference := _difference(actual[key], value))
    ]


def _difference(actual: Any, expected: Any) -> str:
    if is_there(actual) != is_there(expected):
        return "it is there on one of them only"
    if not is_there(expected):
        return ""
    ours, theirs = (pytree.tree_leaves(plain(value)) for value in (actual, expected))
    if len(ours) != len(theirs):
        return f"{len(ours)} are not {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            if one != other:
                return f"{one!r} is not {other!r}"
        elif one.shape != other.shape:
            return f"{one.shape} is not {other.shape}"
        elif not torch.allclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE,
                                equal_nan=True):  # fmt: skip
            return f"off by {(one.double() - other.double()).abs().max()}"
    return ""


def everywhere(model: LanguageModel) -> dict[str, Any]:
    """Reads and writes at every module that gives a tensor, and calls those that take one."""
    paths = [m.path for m in model._description.modules if m.path and m.call_order]
    saved: dict[str, Any] = {}
    with model.trace(IDS):
        for path in paths:
            saved[path] = model.get(path).output.save()
    chosen = [path for path, value in saved.items() if _is_hidden(value)]
    generator = random.Random(0)
    for path in generator.sample(chosen, min(len(chosen), 8)):
        with model.session():
            with model.trace(IDS):
                value = model.get(path).output
                saved[f"{path} part"] = value[:, -1].save()
                saved[f"{path} last"] = value[..., -3:].save()
                value[:, 2, 1:5] = 0.25
                model.get(path).output = value.flip(-1) * 0.5
                saved[f"{path} written"] = model.lm_head.output.save()
            with model.trace(IDS):
                value = model.get(path).output[:, -2:]
                saved[f"{path} positions"] = value.save()
                saved[f"{path} sum"] = model.get(path).output[:, 1].sum(-1).save()
    return saved


def heads(model: LanguageModel) -> dict[str, Any]:
    """What is in the heads of all ranks, with one of them written, and gradients by it."""
    saved: dict[str, Any] = {}
    names = ("q", "k", "q_rotary", "k_rotary", "v", "scores", "pattern", "z")
    shown = [name for name in names if name in dir(model.blocks[1].attn.heads)]
    for name in shown:
        with model.trace(IDS):
            value = getattr(model.blocks[1].attn.heads, name)
            value[:, -1] = value[:, 0] * 0.5
            saved[name] = value.save()
            saved[f"logits, {name} written"] = model.lm_head.output.save()
    with model.trace(IDS):
        values = {name: getattr(model.blocks[1].attn.heads, name) for name in shown}
        model.lm_head.output[0, -1].log_softmax(-1)[3].backward()
        for name, value in values.items():
            saved[f"by {name}"] = value.grad.save()
    return saved


def recorded_gradients(model: LanguageModel) -> dict[str, Any]:
    """Gradients of values that are whole on each rank, of split ones, and of what was written."""
    with model.trace(IDS):
        hidden = [block.output[0] for block in model.blocks]
        hidden[0][:, 2] = hidden[0][:, 1] * 0.5
        scores = model.lm_head.output[0, -1].log_softmax(-1)
        scores[3].backward()
        found = {f"layer {n}": at.grad.save() for n, at in enumerate(hidden)}
        found["by the embedding"] = model.embed.output.grad.save()
        with scores[5].backward():
            hidden[1].grad = hidden[1].grad * 2
            hidden[2].grad[:, 3] = 0
            found["of another pass, written"] = hidden[0].grad.save()
    return found


def gradients_together(model: LanguageModel) -> dict[str, Any]:
    """Gradients of traces that share a pass, also where layers run again."""
    found = {}
    for options in ({}, {"checkpoint": True}):
        with model.session(**options):
            for number, ids in enumerate((IDS, IDS[::-1])):
                with model.trace(ids):
                    hidden = [block.output[0] for block in model.blocks[number:]]
                    hidden[0][:, 2] *= 0.5
                    model.lm_head.output[0, -1].log_softmax(-1)[3].backward()
                    for at in hidden:
                        found[f"{options}, {len(found)}"] = at.grad.save()
    return found


def trained_vector(model: LanguageModel) -> dict[str, Any]:
    """A steering vector after two steps, with layers that run again."""
    found = {}
    with model.session(checkpoint=True) as session:
        vector = session.parameter(torch.zeros(model.config.hidden_size))
        optimizer = insitu.optim.SGD([vector], lr=1.0)
        for _ in range(2):
            with model.trace(IDS):
                model.blocks[0].output[0][:] += vector
                model.lm_head.output[0, -1].log_softmax(-1)[3].backward()
            optimizer.step()
        found["vector"] = vector.save()
    return found


_SPLIT = ("up_proj", "c_fc", "fc1", "dense_h_to_4h", "gate_up_proj", "fc_in", "q_proj")


def _split_path(model: LanguageModel, block: str) -> str:
    """Gives a module of a block whose output is split over ranks."""
    below = [at.path for at in model._description.modules if at.path.startswith(f"{block}.")]
    return min(
        (path for path in below if path.rpartition(".")[2] in _SPLIT),
        key=lambda path: _SPLIT.index(path.rpartition(".")[2]),
    )


def generations(model: LanguageModel) -> dict[str, Any]:
    """Tokens that are chosen and drawn, with writes to what is split, alone and together."""
    saved: dict[str, Any] = {}
    with model.session():
        for number in range(3):
            options = {"do_sample": number > 0, "seed": number, "eos_token_id": None}
            with model.generate(IDS, max_new_tokens=4 + number, **options) as tracer:
                for step in tracer.iter[:]:
                    block = model.blocks[number]
                    split = model.get(_split_path(model, block.path))
                    saved[f"normed {number} {step}"] = split.output.norm().save()
                    split.output[..., :3] = 0.1
                    block.output[0][:, -1] *= 1 + 0.1 * number
                saved[f"ids {number}"] = tracer.result.save()
    return saved


def _is_hidden(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim == 3
        and value.shape[:2] == (1, len(IDS))
        and value.shape[2] > 8
    )


def gradients(ranks: Ranks, folders: dict[str, Path]) -> dict[str, list[str]]:
    """Compares gradients through split tensors that are read whole and written back, by model."""
    return {name: _compared_gradients(ranks, folder) for name, folder in folders.items()}


def _compared_gradients(ranks: Ranks, folder: Path) -> list[str]:
    split = engine.load_model("split", folder, ranks=ranks)
    whole = engine.load_model("whole", folder)
    found = []
    for path in sorted(split.layouts.outputs.keys() & _LINEAR_PATHS):
        ours, theirs = _gradients(split, path), _gradients(whole, path)
        for one, other in zip(ours, theirs, strict=True):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                found.append(f"{path}: off by {(one - other).abs().max()}")
    return found or ([] if split.layouts.outputs else ["nothing is split"])


_LINEAR_PATHS = {
    "model.layers.1.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.mlp.c_fc",
}


def _gradients(model: engine.LoadedModel, path: str) -> list[torch.Tensor]:
    """Gives the gradients of a score at the embedding, and at a value that is read and written."""
    layout = model.layouts.at(path, is_input=False)
    seen: list[torch.Tensor] = []

    def start(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().clone().requires_grad_())
        return seen[0]

    def write(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        value = layout.gather(output)
        value.retain_grad()
        seen.append(value)
        changed: torch.Tensor = layout.scatter(value.flip(-1) * value.mean())
        return changed

    embedding = model.module.get_input_embeddings()
    hooks = [embedding.register_forward_hook(start)]
    hooks.append(model.modules[path].register_forward_hook(write))
    with torch.enable_grad():
        logits = model.module(input_ids=torch.tensor([IDS]), use_cache=False).logits
        logits.log_softmax(-1)[0, -1, 7].backward()
    for hook in hooks:
        hook.remove()
    return [value.grad for value in seen if value.grad is not None]

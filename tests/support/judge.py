"""One experiment on any family, in insitu's words and with hand-written hooks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu import LanguageModel

IDS = [5, 9, 17, 23, 42, 61, 7]
OTHER_IDS = [11, 3, 200, 150, 31]

_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
_NORMS = (
    "model.norm",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
    "model.final_layernorm",
)
_MLPS = ("mlp", "block_sparse_moe", "fc2")

Results = dict[str, torch.Tensor]


def with_insitu(model: LanguageModel, *, remote: bool = False) -> Results:
    """Patches a hidden state into another prompt, damps an MLP, skips a layer, has a lens."""
    has = model._tree.__contains__
    blocks, norm = _first(_BLOCKS, has), _first(_NORMS, has)
    mlp = _first([f"{blocks}.1.{name}" for name in _MLPS], has)
    with model.session(remote=remote):
        with model.trace(IDS):
            hidden = model.get(f"{blocks}.2").output[0][:, -1]
            entering = model.get(f"{blocks}.1").input.save()
            clean = model.lm_head.output.save()
        with model.trace(OTHER_IDS):
            model.get(f"{blocks}.0").output[0][:, -1] = hidden
            model.get(mlp).output = model.get(mlp).output * 0.5
            model.get(f"{blocks}.2").skip(model.get(f"{blocks}.1").output)
            patched = model.lm_head.output.save()
            lens = model.lm_head(model.get(norm)(model.get(f"{blocks}.0").output[0])).save()
    return {"entering": entering, "clean": clean, "patched": patched, "lens": lens}


def with_hooks(module: Any) -> Results:
    """Does the same by hand."""
    names = dict(module.named_modules())
    blocks, norm = _first(_BLOCKS, names.__contains__), _first(_NORMS, names.__contains__)
    mlp = _first([f"{blocks}.1.{name}" for name in _MLPS], names.__contains__)
    seen: Results = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: seen.__setitem__(name, _hidden(output).clone())

    def keep_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["entering"] = (args[0] if args else kwargs["hidden_states"]).clone()

    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(names[f"{blocks}.2"].register_forward_hook(keep("hidden")))
        hooks.enter_context(
            names[f"{blocks}.1"].register_forward_pre_hook(keep_input, with_kwargs=True)
        )
        clean = module(input_ids=torch.tensor([IDS])).logits
    entering = seen["entering"]

    def patch(_: Any, __: Any, output: Any) -> None:
        _hidden(output)[:, -1] = seen["hidden"][:, -1]
        seen["patched"] = _hidden(output).clone()

    def damp(_: Any, __: Any, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    def skip(_: Any, __: Any, output: Any) -> Any:
        return (seen["before"], *output[1:]) if isinstance(output, tuple) else seen["before"]

    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(names[f"{blocks}.0"].register_forward_hook(patch))
        hooks.enter_context(names[mlp].register_forward_hook(damp))
        hooks.enter_context(names[f"{blocks}.1"].register_forward_hook(keep("before")))
        hooks.enter_context(names[f"{blocks}.2"].register_forward_hook(skip))
        patched = module(input_ids=torch.tensor([OTHER_IDS])).logits
    with torch.no_grad():
        lens = module.lm_head(names[norm](seen["patched"]))
    return {"entering": entering, "clean": clean, "patched": patched, "lens": lens}


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _first(paths: Any, has: Callable[[str], bool]) -> str:
    return next(path for path in paths if has(path))

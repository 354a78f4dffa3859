"""Operations that fail on one rank alone, as they do where its memory is full."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from insitu import LanguageModel
from insitu_shard.engine import execute
from insitu_shard.engine.ranks import RankLostError
from insitu_wire.errors import Error
from support.split_cases import IDS, split_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from insitu_shard.engine.ranks import Ranks


def outcomes(ranks: Ranks, folder: Path) -> dict[str, str]:
    """Has each case fail on each rank alone; tells what came of it and of the next trace."""
    model = split_model(folder, ranks)
    clean = _logits(model)
    told = {}
    for case in (_calls_the_head, _writes, _stops, _skips, _calls_often, _shares_a_pass):
        for failing in range(ranks.size):
            with _failing_cosine(ranks.rank == failing):
                error = _error_of(case, model)
            is_as_before = torch.equal(_logits(model), clean)
            told[f"{case.__name__} {failing}"] = f"{error}, {is_as_before}"
    return told


@contextmanager
def _failing_cosine(is_failing: bool) -> Iterator[None]:
    original = execute.function

    def function(name: str) -> Any:
        if is_failing and name.endswith(".cos"):
            raise MemoryError("this rank has no memory left")
        return original(name)

    with patch.object(execute, "function", function):
        yield


def _error_of(case: Callable[[Any], None], model: LanguageModel) -> str:
    try:
        case(model)
    except Error as err:
        return type(err).__name__
    return "no error"


def _logits(model: Any) -> torch.Tensor:
    with model.trace(IDS):
        logits: torch.Tensor = model.lm_head.output.save()
    return logits


def _calls_the_head(model: Any) -> None:
    with model.trace(IDS):
        model.lm_head(model.model.layers[0].output[0].cos()).save()
        model.lm_head.output.save()


def _writes(model: Any) -> None:
    with model.trace(IDS):
        model.model.layers[1].mlp.up_proj.output = model.model.layers[0].mlp.up_proj.output.cos()
        model.lm_head.output.save()


def _stops(model: Any) -> None:
    with model.trace(IDS) as tracer:
        model.model.layers[0].output[0].cos().save()
        model.model.layers[1].output.save()
        tracer.stop()


def _skips(model: Any) -> None:
    with model.trace(IDS):
        model.model.layers[1].skip(model.model.layers[0].output[0].cos())
        model.lm_head.output.save()


def _calls_often(model: Any) -> None:
    with model.trace(IDS):
        for layer in model.model.layers:
            model.lm_head(model.model.norm(layer.output[0].cos())).save()


def _shares_a_pass(model: Any) -> None:
    with model.session():
        with model.trace(IDS):
            model.model.layers[0].output[0][:] += 1
            model.lm_head(model.model.layers[1].output[0]).save()
        with model.trace(IDS):
            model.model.layers[1].output[0][:, -1] = model.model.layers[0].output[0][:, 0].cos()
            model.lm_head(model.model.layers[1].output[0]).save()
            model.lm_head.output.save()


def outcomes_in_the_model(ranks: Ranks, folder: Path, failing: list[int], case: str) -> list[str]:
    """Has memory run out within the model on some ranks.

    Returns:
        What came of the trace, and of the next one where the group goes on.
    """
    model = split_model(folder, ranks)
    clean = _logits(model)
    run = {"pass": _logits, "module call": _calls_a_block, "gradient": _takes_a_gradient}[case]
    try:
        with _failing_module(model, ranks.rank in failing, is_backward=case == "gradient"):
            run(model)
    except RankLostError as err:
        return [str(err)]
    except Error as err:
        return [err.reason, str(torch.equal(_logits(model), clean))]
    return ["no error"]


@contextmanager
def _failing_module(model: LanguageModel, is_failing: bool, *, is_backward: bool) -> Iterator[None]:
    """Has an MLP ask for more memory than there can be, before what follows joins the ranks."""
    module = model._local._model.modules["model.layers.1.mlp.act_fn"]

    def ask(*_: object) -> None:
        torch.empty(2**55)

    if not is_failing:
        yield
        return
    register = module.register_full_backward_hook if is_backward else module.register_forward_hook
    with register(ask):
        yield


def _calls_a_block(model: Any) -> None:
    with model.trace(IDS):
        model.model.layers[1].mlp(model.model.layers[0].output[0]).save()
        model.model.layers[0].output.save()


def _takes_a_gradient(model: Any) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        model.lm_head.output[0, -1].log_softmax(-1)[3].backward()
        hidden.grad.save()

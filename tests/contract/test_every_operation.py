"""The whole table of operations: one call of each gives in a session what it gives in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu import LanguageModel
from insitu._proxy import Proxy
from insitu_wire.operations import OPERATIONS, RANDOM, is_in_place, last_word
from support.operation_samples import NOT_SAMPLED, function, sample
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]
_NEVER_THE_SAME = RANDOM | {"torch.empty", "torch.empty_like", "torch.Tensor.new_empty"}
"""Of what these give, shape and dtype are compared alone."""

_UNKNOWN_TUPLES = {"torch.linalg.lstsq"}
"""These give tuples of which nothing is known while recording, so that they are saved by item."""

_LAPACK = {"cholesky", "det", "inverse", "logdet", "pinverse", "slogdet", "svd"}
"""These, and all of torch.linalg, round by where in memory their arguments happen to lie."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


@pytest.fixture(scope="module")
def hidden(model: LanguageModel) -> torch.Tensor:
    with model.trace(IDS):
        saved = model.model.layers[0].output[0].save()
    return torch.as_tensor(saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(OPERATIONS - NOT_SAMPLED.keys()))
def test_an_operation_gives_what_torch_gives(
    name: str, model: LanguageModel, hidden: torch.Tensor
) -> None:
    expected, expected_target = _call(name, hidden)
    with model.trace(IDS):
        actual, actual_target = _call(name, model.model.layers[0].output[0])
        told = [_told(leaf) for leaf in _leaves(actual)]
        for proxy in _leaves((actual, actual_target)):
            if isinstance(proxy, torch.Tensor):
                proxy.save()
    for was_told, leaf in zip(told, _leaves(expected), strict=True):
        if was_told is not None:
            # What is a number in torch counts as a tensor without dimensions.
            assert was_told == (torch.as_tensor(leaf).shape, torch.as_tensor(leaf).dtype)
    if name in _NEVER_THE_SAME:
        actual, expected = torch.zeros_like(actual), torch.zeros_like(expected)
        actual_target = expected_target = None
    is_exact = "linalg" not in name and last_word(name) not in _LAPACK
    _check_same(actual, expected, tolerance=0 if is_exact else 1e-3)
    _check_same(actual_target, expected_target)


def test_every_operation_is_sampled_or_named_as_one_that_can_not_be() -> None:
    assert NOT_SAMPLED.keys() <= OPERATIONS
    of_torch = [name for name in NOT_SAMPLED if not name.startswith("insitu.")]
    assert len(of_torch) < 0.015 * len(OPERATIONS)


def _call(name: str, hidden: Any) -> tuple[Any, Any]:
    """Gives the result of an operation's sample call, and what it has written into if it does."""
    args, kwargs = sample(name, hidden)
    result = function(name)(*args, **kwargs)
    if name in _UNKNOWN_TUPLES:
        result = result[0]
    return result, args[0] if is_in_place(name) else None


def _told(leaf: Any) -> Any:
    """Gives the shape and dtype that are known while recording; None where they are not."""
    meta = leaf._meta if isinstance(leaf, Proxy) else None
    return None if meta is None else (meta.shape, meta.dtype)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _check_same(actual: Any, expected: Any, *, tolerance: float = 0) -> None:
    for got, wanted in zip(_leaves(actual), _leaves(expected), strict=True):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(
                got, torch.as_tensor(wanted), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        else:
            assert got == wanted

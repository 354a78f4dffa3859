from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
import torch

from insitu_wire.operations import OPERATIONS, is_in_place, may_alias, nearest


def test_every_name_is_a_public_function_of_torch_or_operator() -> None:
    namespace = SimpleNamespace(torch=torch, operator=operator)
    for name in (name for name in OPERATIONS if not name.startswith("insitu.")):
        assert callable(operator.attrgetter(name)(namespace)), name


@pytest.mark.parametrize(
    "name",
    ["torch.load", "torch.save", "torch.Tensor.data_ptr", "torch.Tensor.numpy",
     "torch.Tensor.storage", "torch.Tensor.apply_", "torch.compile", "operator.attrgetter"],
)  # fmt: skip
def test_what_reads_files_runs_code_or_shows_memory_is_not_in_the_table(name: str) -> None:
    assert name not in OPERATIONS


def test_writes_in_place_are_known_by_name() -> None:
    assert is_in_place("torch.Tensor.__setitem__")
    assert is_in_place("torch.Tensor.add_")
    assert not is_in_place("torch.Tensor.add")
    assert not is_in_place("torch.Tensor.__getitem__")


@pytest.mark.filterwarnings("ignore")
def test_no_operation_shares_memory_without_being_known_to() -> None:
    """Runs every operation that takes one matrix alone, and looks at its result's memory."""
    names = (name for name in OPERATIONS if not name.startswith("insitu."))
    sharing = {name for name in names if _shares_memory(name)}
    assert {name for name in sharing if not may_alias(name)} == set()
    assert "torch.Tensor.transpose" not in sharing, "it needs more than one argument"
    assert {"torch.Tensor.T.__get__", "torch.Tensor.relu_", "torch.ravel"} <= sharing


def _shares_memory(name: str) -> bool:
    tensor = torch.rand(4, 4) + torch.eye(4)
    function = operator.attrgetter(name)(SimpleNamespace(torch=torch, operator=operator))
    try:
        result = function(tensor)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    parts = result if isinstance(result, tuple | list) else [result]
    memory = tensor.untyped_storage().data_ptr()
    return any(
        isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() == memory
        for part in parts
    )


def test_the_nearest_names_are_those_with_the_same_word() -> None:
    assert "torch.argmax" in nearest("numpy.argmax")
    assert nearest("torch.argmx")

"""Resolves the names of the shared table to torch's functions, once."""

from __future__ import annotations

import operator
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.control import holds
from insitu_shard.engine.memory import copied
from insitu_wire.errors import Reason, error
from insitu_wire.operations import LAST, OPERATIONS, SELECT, VARIABLE, nearest

if TYPE_CHECKING:
    from collections.abc import Callable


def function(name: str) -> Callable[..., Any]:
    """Gives the function of an operation.

    Raises:
        InvalidTraceError: UNKNOWN_OPERATION for a name that the table lacks.
    """
    try:
        return _functions()[name]
    except KeyError:
        raise error(
            Reason.UNKNOWN_OPERATION,
            f"there is no operation {name!r}; the nearest are {', '.join(nearest(name)) or 'none'}",
            operation=name,
        ) from None


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    namespace = SimpleNamespace(torch=torch, operator=operator)
    functions = {
        name: operator.attrgetter(name)(namespace)
        for name in OPERATIONS
        if not name.startswith("insitu.")
    }
    return functions | {
        # What looked like a tensor while it was recorded may be a tuple: torch.unique gives either.
        "torch.Tensor.__getitem__": operator.getitem,
        # Stays a tensor, so that tensor methods on it go on working where the model runs.
        "torch.Tensor.item": lambda tensor: tensor.reshape(()).clone(),
        VARIABLE: lambda value: value,
        SELECT: lambda condition, one, other: one if holds(condition) else other,
        LAST: lambda *values: values[-1],
        "insitu.list": lambda items: list(copied(items)),
        "insitu.dict": lambda items: dict(copied(items)),
        "insitu.append": lambda container, item: container.append(copied(item)),
        "insitu.extend": lambda container, items: container.extend(copied(list(items))),
        "insitu.set_item": lambda container, key, item: operator.setitem(
            container, _key(key), copied(item)
        ),
        "insitu.len": lambda value: torch.tensor(len(value)),
    }


def _key(key: object) -> object:
    """Gives a number for a tensor of one element: the items of a loop over numbers are such."""
    return key.item() if isinstance(key, torch.Tensor) else key

"""Finds the name in the shared table of the torch function that the user called."""

from __future__ import annotations

import operator
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from insitu_wire.errors import Location, Reason, error
from insitu_wire.operations import OPERATIONS, nearest

if TYPE_CHECKING:
    from collections.abc import Callable


def operation_name(function: Callable[..., object], location: Location) -> str:
    """Gives the name of an operation.

    Raises:
        InvalidTraceError: UNKNOWN_OPERATION, at the user's line, for one that the table lacks.
    """
    if (name := _names().get(function)) is not None:
        return name
    wanted = torch.overrides.resolve_name(function) or getattr(function, "__name__", str(function))
    suggestions = ", ".join(nearest(wanted)) or "print(sorted(insitu_wire.operations.OPERATIONS))"
    raise error(
        Reason.UNKNOWN_OPERATION,
        f"{wanted} is not an operation that runs inside a session; the nearest are {suggestions}",
        location=location,
        operation=wanted,
    )


@cache
def _names() -> dict[Callable[..., object], str]:
    namespace = SimpleNamespace(torch=torch, operator=operator)
    # Where torch has one function under several names, the shortest says it best.
    torchs = (name for name in OPERATIONS if not name.startswith("insitu."))
    names = sorted(torchs, key=lambda name: (-len(name), name))
    return {operator.attrgetter(name)(namespace): name for name in names}

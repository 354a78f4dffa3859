"""Reads and writes the arguments and results of a module's call.

A decoder layer returns a tuple in one version or family of transformers and a tensor in another; to
an intervention its output is always the hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from insitu_shard.engine.graph import Side
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu_shard.engine.graph import HookPoint


class BoundaryValue(Protocol):
    """What the model holds at a boundary."""

    @property
    def raw(self) -> Any:
        """What the model is to go on with."""

    def read(self, point: HookPoint) -> object:
        """Gives the value at a hook point."""

    def write(self, point: HookPoint, value: object) -> None:
        """Replaces the value at a hook point."""


@dataclass(slots=True)
class InputValue:
    """The arguments of a call."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    @property
    def raw(self) -> Any:
        """The arguments as (positional, keyword)."""
        return self.args, self.kwargs

    def holding(self, raw: Any) -> InputValue:
        """Gives the same for other arguments."""
        return InputValue(*raw)

    def read(self, point: HookPoint) -> object:
        """Gives the first argument, or all of them as (positional, keyword)."""
        if point.side is Side.INPUTS:
            return self.args, self.kwargs
        return self.first

    @property
    def first(self) -> object:
        """The first argument; None if there is none."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def write(self, point: HookPoint, value: object) -> None:
        """Replaces the first argument, or all of them."""
        if point.side is Side.INPUTS:
            self.args, self.kwargs = _fitted_inputs((self.args, self.kwargs), value, point)
        elif self.args:
            self.args = (_fitted(self.args[0], value, point), *self.args[1:])
        else:
            name = next(iter(self.kwargs))
            self.kwargs = {**self.kwargs, name: _fitted(self.kwargs[name], value, point)}


@dataclass(slots=True)
class OutputValue:
    """The result of a call."""

    result: object
    is_block: bool = field(default=False)

    @property
    def raw(self) -> Any:
        """The result as the module gave it."""
        return self.result

    def holding(self, raw: Any) -> OutputValue:
        """Gives the same for another result."""
        return OutputValue(raw, self.is_block)

    def read(self, point: HookPoint) -> object:
        """Gives the result; for a decoder layer, its hidden state."""
        if self.is_block and isinstance(self.result, tuple):
            return self.result[0]
        return self.result

    def write(self, point: HookPoint, value: object) -> None:
        """Replaces the result; for a decoder layer, its hidden state."""
        if self.is_block and isinstance(self.result, tuple):
            self.result = (_fitted(self.result[0], value, point), *self.result[1:])
        else:
            self.result = _fitted(self.result, value, point)


def _fitted(old: object, new: object, point: HookPoint) -> object:
    """Checks that a new value can stand where the old one stood, and casts it to its dtype."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.shape != new.shape:
            raise error(
                Reason.SHAPE_MISMATCH,
                f"{point} is {list(old.shape)} and can not be replaced by a tensor of "
                f"{list(new.shape)}; write a tensor of {list(old.shape)}, or a part with "
                "[...] = ...",
                hookPoint=point,
                expected=list(old.shape),
                actual=list(new.shape),
            )
        # Memory of its own: what is written to this place later is no write to the value.
        return new.to(device=old.device, dtype=old.dtype, copy=True)
    if isinstance(old, tuple | list) and isinstance(new, tuple | list) and len(old) == len(new):
        fitted = (_fitted(was, now, point) for was, now in zip(old, new, strict=True))
        return type(old)(fitted)
    if type(old) is not type(new):
        raise error(
            Reason.SHAPE_MISMATCH,
            f"{point} is a {type(old).__name__} and can not be replaced by a {type(new).__name__}; "
            "write the same structure that reading it gives",
            hookPoint=point,
            expected=type(old).__name__,
            actual=type(new).__name__,
        )
    return new


def _fitted_inputs(
    old: tuple[tuple[object, ...], dict[str, object]], new: object, point: HookPoint
) -> tuple[tuple[object, ...], dict[str, object]]:
    match new:
        case (tuple() | list() as args, dict() as kwargs):
            names = list(old[1])
            if len(args) == len(old[0]) and kwargs.keys() == old[1].keys():
                fitted = [_fitted_argument(*pair, point) for pair in zip(old[0], args, strict=True)]
                return tuple(fitted), {
                    name: _fitted_argument(old[1][name], kwargs[name], point) for name in names
                }
            actual = f"{len(args)} and {', '.join(map(str, kwargs)) or 'none'}"
        case _:
            actual = f"a {type(new).__name__}"
    expected = f"{len(old[0])} positional arguments and {', '.join(old[1]) or 'none'} by keyword"
    raise error(
        Reason.SHAPE_MISMATCH,
        f"{point} is a pair (positional arguments, keyword arguments) of {expected}, and can not "
        f"be replaced by {actual}; change what reading it gives",
        hookPoint=point,
        expected=expected,
        actual=actual,
    )


def _fitted_argument(old: object, new: object, point: HookPoint) -> object:
    """As `_fitted`, but a mask may be left out, or be of another dtype."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return new
    are_floats = old.is_floating_point() and new.is_floating_point()
    return _fitted(old, new, point) if are_floats else _fitted(old.to(new.dtype), new, point)


def check_token_ids(arguments: tuple[Any, Any], vocab_size: int, point: str) -> None:
    """Refuses ids that the embedding has no row for.

    A rank that holds a part of the rows would give zeros for them and say nothing.

    Raises:
        Error: MALFORMED_SESSION.
    """
    ids = InputValue(*arguments).first
    if not isinstance(ids, torch.Tensor) or not ids.numel():
        return
    if ids.is_floating_point() or ids.min() < 0 or ids.max() >= vocab_size:
        raise error(
            Reason.MALFORMED_SESSION,
            f"{point} takes token ids from 0 to {vocab_size - 1}; this trace gives it "
            f"{ids.min().item()} to {ids.max().item()} ({str(ids.dtype).removeprefix('torch.')})",
            hookPoint=point,
            vocabSize=vocab_size,
        )

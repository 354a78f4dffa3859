"""The optimizers that a session may use: one table of torch's names, shared by both ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Flag:
    """An option that is true or false."""

    def problem(self, value: object) -> str:
        """Says what is wrong with a value; empty if nothing is."""
        return "" if isinstance(value, bool) else "True or False"


@dataclass(frozen=True, slots=True)
class Number:
    """An option that is one or more numbers."""

    below: float = math.inf
    """All are 0 or more, and less than this."""
    length: int = 0
    """How many numbers, in a tuple or list; 0 for one that stands by itself."""
    may_be_negative: bool = False

    def problem(self, value: object) -> str:
        """Says what is wrong with a value; empty if nothing is."""
        items = value if self.length and isinstance(value, tuple | list) else (value,)
        is_well = len(items) == max(self.length, 1) and all(map(self._is_allowed, items))
        return "" if is_well else self._allowed

    def _is_allowed(self, item: object) -> bool:
        if isinstance(item, bool) or not isinstance(item, int | float):
            return False
        return math.isfinite(item) and (self.may_be_negative or 0 <= item < self.below)

    @property
    def _allowed(self) -> str:
        what = f"{self.length} numbers" if self.length else "a number"
        if self.may_be_negative:
            return what
        limit = f" to below {self.below:g}" if math.isfinite(self.below) else " or more"
        return f"{what}, 0{limit}"


_ADAM: dict[str, Number | Flag] = {
    "lr": Number(),
    "betas": Number(below=1, length=2),
    "eps": Number(),
    "weight_decay": Number(),
    "amsgrad": Flag(),
    "maximize": Flag(),
}

OPTIMIZERS: Mapping[str, Mapping[str, Number | Flag]] = {
    "SGD": {
        "lr": Number(),
        "momentum": Number(),
        "dampening": Number(may_be_negative=True),
        "weight_decay": Number(),
        "nesterov": Flag(),
        "maximize": Flag(),
    },
    "Adam": _ADAM,
    "AdamW": _ADAM,
}
"""What each optimizer takes, by the names in torch.optim. Names are added, never removed."""


def problem(name: str, options: Mapping[str, object]) -> str:
    """Says what is wrong with the options of an optimizer; empty if nothing is.

    Args:
        name: one of the table.
        options: values by the options' names.
    """
    allowed = OPTIMIZERS[name]
    for option, value in options.items():
        if option not in allowed:
            return f"{option} is no option of {name}; use {', '.join(allowed)}"
        if wanted := allowed[option].problem(value):
            return f"{option} of {name} is {value!r:.80}; use {wanted}"
    if "lr" not in options:
        return f"{name} has no lr; give it a learning rate"
    return ""

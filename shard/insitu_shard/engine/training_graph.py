"""The operations of a trace that train: parameters, backward passes into them, optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Written = tuple[tuple[object, object], ...]
"""Pairs of a value and the gradient that a backward pass is to go on with there."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Makes a copy of a value that is trained."""

    value: object

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return (self.value,)


@dataclass(frozen=True, slots=True)
class Backward:
    """Adds the gradients of a loss by parameters to what these have."""

    loss: object
    gradient: object
    """The gradient of the loss itself; None for 1."""
    parameters: tuple[object, ...]
    written: Written = ()

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return (self.loss, self.gradient, *self.parameters, *self.written)


@dataclass(frozen=True, slots=True)
class ReadGradient:
    """Gives what backward passes have added up for a parameter."""

    parameters: tuple[object, ...]
    """One."""

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return self.parameters


@dataclass(frozen=True, slots=True)
class WriteGradient:
    """Gives a parameter another gradient; None clears it."""

    parameters: tuple[object, ...]
    """One."""
    gradient: object

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return (*self.parameters, self.gradient)


@dataclass(frozen=True, slots=True)
class ZeroGradient:
    """Clears the gradients of parameters."""

    parameters: tuple[object, ...]
    keeps_tensors: bool = False
    """Whether those that have a gradient get one of zeros."""

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return self.parameters


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Makes an optimizer."""

    name: str

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments: none."""
        return ()


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Changes parameters by their gradients."""

    optimizer: object
    groups: tuple[tuple[tuple[object, ...], Mapping[str, object]], ...]
    """Parameters, and the options of their change."""

    @property
    def parameters(self) -> tuple[object, ...]:
        """Those of all groups."""
        return tuple(parameter for parameters, _ in self.groups for parameter in parameters)

    @property
    def operands(self) -> tuple[object, ...]:
        """Its arguments."""
        return (self.optimizer, *self.parameters)


Training = (
    Parameter | Backward | ReadGradient | WriteGradient | ZeroGradient | Optimizer | OptimizerStep
)
Trainer = Backward | ReadGradient | WriteGradient | ZeroGradient | OptimizerStep
"""What has to do with the gradients of parameters: in the order of definition."""

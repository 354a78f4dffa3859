"""Parameters and optimizers of a session, and what is done to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu_shard.engine.training_graph import (
    Optimizer,
    OptimizerStep,
    Parameter,
    ReadGradient,
    WriteGradient,
    ZeroGradient,
)
from insitu_wire.errors import Reason, error
from insitu_wire.optimizers import OPTIMIZERS, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from insitu_shard.engine.training_graph import Training


class ParameterValue:
    """A parameter where the session runs.

    Attributes:
        leaf: its elements, which require a gradient; `.grad` is what backward passes have added up.
    """

    def __init__(self, value: object) -> None:
        """Copies a tensor."""
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise _refused("a parameter is a tensor of floating-point elements", value)
        self.leaf = value.detach().clone(memory_format=torch.contiguous_format).requires_grad_()

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """What it keeps in memory."""
        yield self.leaf
        if self.leaf.grad is not None:
            yield self.leaf.grad

    def update(self, value: object) -> None:
        """Gives it other elements."""
        if not isinstance(value, torch.Tensor) or value.shape != self.leaf.shape:
            raise _refused(f"this parameter is {list(self.leaf.shape)}", value)
        with torch.no_grad():
            self.leaf.copy_(value)

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Adds to its gradient."""
        before = self.leaf.grad
        self.leaf.grad = gradient.detach().clone() if before is None else before + gradient

    def clear_gradient(self, *, keeps_tensor: bool) -> None:
        """Takes its gradient away, or makes it 0 if it has one."""
        has_one = keeps_tensor and self.leaf.grad is not None
        self.leaf.grad = torch.zeros_like(self.leaf) if has_one else None

    @property
    def gradient(self) -> torch.Tensor:
        """A copy of what backward passes have added up."""
        if self.leaf.grad is None:
            raise error(
                Reason.INTERVENTION_RAISED,
                "this parameter has no gradient: no backward pass has reached it since its "
                "gradient was last cleared",
            )
        return self.leaf.grad.clone()

    @gradient.setter
    def gradient(self, value: object) -> None:
        if value is None:
            self.leaf.grad = None
            return
        if not isinstance(value, torch.Tensor) or value.shape != self.leaf.shape:
            raise _refused(f"the gradient of this parameter is {list(self.leaf.shape)}", value)
        self.leaf.grad = value.detach().to(self.leaf.dtype, copy=True)


class OptimizerValue:
    """An optimizer where the session runs: torch's own, made at its first step."""

    def __init__(self, name: str) -> None:
        if name not in OPTIMIZERS:
            raise error(
                Reason.UNKNOWN_OPERATION,
                f"there is no optimizer {name!r}; use {', '.join(OPTIMIZERS)}",
                operation=name,
            )
        self._name = name
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """What it keeps in memory."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        for state in states:
            yield from (part for part in state.values() if isinstance(part, torch.Tensor))

    def step(self, groups: list[dict[str, Any]]) -> None:
        """Changes parameters by their gradients.

        Args:
            groups: as torch takes them.
        """
        for group in groups:
            options = {key: value for key, value in group.items() if key != "params"}
            if wrong := problem(self._name, options):
                raise error(Reason.MALFORMED_SESSION, wrong)
        if self._optimizer is None:
            self._optimizer = getattr(torch.optim, self._name)(groups)
        for known, group in zip(self._optimizer.param_groups, groups, strict=True):
            if list(map(id, known["params"])) != list(map(id, group["params"])):
                raise error(
                    Reason.MALFORMED_SESSION,
                    f"this step of {self._name} has other parameters than the one before; "
                    "make an optimizer for these",
                )
            known.update(group)
        self._optimizer.step()


def seen(value: object) -> object:
    """Gives what nodes see of a value: of a parameter its elements, without a graph."""
    return value.leaf.detach() if isinstance(value, ParameterValue) else value


def applied(operation: Training, resolve: Callable[[Any], Any], raw: Callable[[Any], Any]) -> Any:
    """Runs an operation that needs no graph, and gives its value.

    Args:
        operation: the operation.
        resolve: puts values in the place of references.
        raw: as that, but with parameters and optimizers themselves.
    """
    match operation:
        case Parameter(value=value):
            return ParameterValue(resolve(value))
        case Optimizer(name=name):
            return OptimizerValue(name)
        case ReadGradient(parameters=(parameter,)):
            return parameter_of(raw(parameter)).gradient
        case WriteGradient(parameters=(parameter,), gradient=gradient):
            parameter_of(raw(parameter)).gradient = resolve(gradient)
        case ZeroGradient(parameters=parameters, keeps_tensors=keeps_tensors):
            for parameter in parameters:
                parameter_of(raw(parameter)).clear_gradient(keeps_tensor=keeps_tensors)
        case OptimizerStep(optimizer=optimizer, groups=groups):
            with torch.no_grad():
                _optimizer_of(raw(optimizer)).step(
                    [
                        {**options, "params": [parameter_of(raw(at)).leaf for at in parameters]}
                        for parameters, options in groups
                    ]
                )
    return None


def parameter_of(value: object) -> ParameterValue:
    """Gives a value that is a parameter.

    Raises:
        Error: MALFORMED_SESSION, if it is none.
    """
    if not isinstance(value, ParameterValue):
        raise _refused("what is trained is made with session.parameter(tensor)", value)
    return value


def _optimizer_of(value: object) -> OptimizerValue:
    if not isinstance(value, OptimizerValue):
        raise _refused("what makes a step is an optimizer of the session", value)
    return value


def _refused(what: str, value: object) -> Exception:
    shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    kind = type(value).__name__.removesuffix("Value")
    return error(Reason.MALFORMED_SESSION, f"{what}, and not a {kind}{shape}")

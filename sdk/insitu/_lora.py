"""LoRA: low-rank changes of linear modules, trained inside a session."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from insitu._envoy import Envoy
from insitu._shapes import structure
from insitu._source import user_location
from insitu._training import Trained, parameter
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from insitu._recorder import SessionRecorder
    from insitu._training import Parameter
    from insitu_wire.errors import Error, Location


class LoRA(Trained):
    """Low-rank changes of linear modules (Hu et al. 2021), as peft makes them.

    Called in a trace, it adds `B(A(input)) * alpha / rank` to the output of each module. Its
    parameters have the names that peft gives them.
    """

    def __init__(
        self,
        recorder: SessionRecorder,
        modules: Envoy | Iterable[Envoy],
        *,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
    ) -> None:
        location = user_location()
        self._modules = [modules] if isinstance(modules, Envoy) else list(modules)
        if not self._modules:
            raise _invalid("a LoRA needs modules, and was given none", location)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise _invalid(f"the rank of a LoRA is {rank!r}; use a whole number from 1", location)
        self._scale = alpha / rank
        self._dtype = dtype
        self._parameters: dict[str, Parameter] = {}
        for module in self._modules:
            num_inputs, num_outputs = _sizes(module, location)
            down = torch.empty(rank, num_inputs, dtype=dtype)
            torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            for letter, value in (("A", down), ("B", torch.zeros(num_outputs, rank, dtype=dtype))):
                self._parameters[_name(module, letter)] = parameter(recorder, value)

    def __call__(self) -> None:
        """Has the modules of the open trace give what they give with the changes."""
        for module in self._modules:
            down, up = (self._parameters[_name(module, letter)] for letter in "AB")
            before = module.output
            low = torch.nn.functional.linear(module.input.to(self._dtype), down)
            change = torch.nn.functional.linear(low, up) * self._scale
            module.output = (before + change).to(before.dtype)


def _name(module: Envoy, letter: str) -> str:
    return f"base_model.model.{module.path}.lora_{letter}.weight"


def _sizes(module: Envoy, location: Location) -> tuple[int, int]:
    """Gives the numbers of features that a module takes and returns."""
    described = module._model._tree[module.path]
    arguments, result = structure(described.args, 1, 1), structure(described.output, 1, 1)
    taken = arguments[0] if isinstance(arguments, tuple) and arguments else None
    if not isinstance(taken, torch.Tensor) or not isinstance(result, torch.Tensor):
        raise _invalid(
            f"{module.path} does not take a tensor and return one, so that no LoRA fits it; use "
            "linear modules, such as model.blocks[3].attn.q_proj",
            location,
        )
    return taken.shape[-1], result.shape[-1]


def _invalid(message: str, location: Location) -> Error:
    return error(Reason.MALFORMED_SESSION, message, location=location)

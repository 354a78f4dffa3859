"""Optimizers that run inside a session: torch's, by their names and arguments in torch.optim.

    optimizer = insitu.optim.AdamW(probe.parameters(), lr=1e-3)

They are torch's optimizers to whom looks at them: `param_groups`, and what changes these, such as
the schedulers of torch.optim.lr_scheduler, work as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu._origin import not_here
from insitu._source import user_location
from insitu._training import Parameter, encoded_list
from insitu_proto.v1 import training_pb2
from insitu_wire.errors import Reason, error
from insitu_wire.optimizers import OPTIMIZERS, problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from insitu._block_recorder import BlockRecorder
    from insitu._recorder import SessionRecorder
    from insitu_wire.errors import Error, Location

__all__ = ["SGD", "Adam", "AdamW"]


class _Recorded:
    """What makes an optimizer of torch one of a session: its steps are recorded."""

    def __init__(
        self, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> None:
        """Makes an optimizer.

        Args:
            params: parameters of a session, or dicts of them with options of their own.
            args: as torch takes them.
            kwargs: as torch takes them.
        """
        location = user_location()
        groups = _groups(params, location)
        self._trained = [[_checked(each, location) for each in group["params"]] for group in groups]
        if not any(self._trained):
            raise _invalid("an optimizer needs parameters, and was given none", location)
        stand_ins = [
            {**group, "params": [_stand_in(each) for each in trained]}
            for group, trained in zip(groups, self._trained, strict=True)
        ]
        try:
            super().__init__(stand_ins, *args, **kwargs)  # type: ignore[call-arg]
        except (TypeError, ValueError) as exception:
            raise _invalid(f"{self._name}: {exception}", location) from None
        self._options(location)
        block = self._block(location)
        self._node_id = block.train(training_pb2.Optimizer(name=self._name), location)

    param_groups: list[dict[str, Any]]

    def step(self, closure: None = None) -> None:
        """Changes the parameters by their gradients; those that have none stay as they are."""
        location = user_location()
        if closure is not None:
            raise _invalid("step(closure) does not run inside a session; call step()", location)
        options = self._options(location)
        block = self._block(location)
        block.end_backward()
        message = training_pb2.OptimizerStep()
        message.optimizer.reference.node_id = self._node_id
        encode = self._recorder.encode
        for trained, own in zip(self._trained, options, strict=True):
            group = message.groups.add(parameters=encoded_list(trained, location))
            for option, value in own.items():
                group.options[option].CopyFrom(encode(value, location))
        block.train(message, location)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the parameters.

        Args:
            set_to_none: as in torch, whether they are gone; else they are 0.
        """
        location = user_location()
        block = self._block(location)
        block.end_backward()
        parameters = encoded_list(self._all, location)
        message = training_pb2.ZeroGradient(parameters=parameters, keeps_tensors=not set_to_none)
        block.train(message, location)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after it was made."""
        if hasattr(self, "_node_id"):
            raise _invalid(
                "an optimizer of a session has the parameters that it was made with; make another "
                "for these",
                user_location(),
            )
        super().add_param_group(param_group)  # type: ignore[misc]

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _all(self) -> list[Parameter]:
        return [each for trained in self._trained for each in trained]

    @property
    def _recorder(self) -> SessionRecorder:
        return self._all[0]._origin.recorder

    def _block(self, location: Location) -> BlockRecorder:
        for each in self._all:
            if each._origin.recorder.state != "recording":
                raise not_here(each._origin)
            if each._origin.recorder is not self._recorder:
                raise _invalid("the parameters of an optimizer are of one session", location)
        return self._recorder.block

    def _options(self, location: Location) -> list[dict[str, object]]:
        """Gives the options of each group as they are now."""
        found = []
        for group in self.param_groups:
            options = {name: group[name] for name in OPTIMIZERS[self._name]}
            if wrong := problem(self._name, options):
                raise _invalid(wrong, location)
            for name in _OF_TORCH_ALONE:
                if group.get(name):
                    raise _invalid(
                        f"{name}={group[name]!r} does not run inside a session; leave it out",
                        location,
                    )
            found.append(options)
        return found


# These say how torch computes, not what.
_OF_TORCH_ALONE = ("foreach", "fused", "capturable", "differentiable")


class SGD(_Recorded, torch.optim.SGD):  # type: ignore[misc] # a closure is refused
    """As torch.optim.SGD."""


class Adam(_Recorded, torch.optim.Adam):  # type: ignore[misc] # a closure is refused
    """As torch.optim.Adam."""


class AdamW(_Recorded, torch.optim.AdamW):  # type: ignore[misc] # a closure is refused
    """As torch.optim.AdamW."""


def _groups(
    params: Iterable[torch.Tensor] | Iterable[dict[str, Any]], location: Location
) -> list[dict[str, Any]]:
    if isinstance(params, torch.Tensor):
        raise _invalid("an optimizer takes a list of parameters, as in SGD([vector])", location)
    given: list[Any] = list(params)
    if given and all(isinstance(each, dict) for each in given):
        return [
            {**each, "params": [one] if isinstance(one := each["params"], Parameter) else list(one)}
            for each in given
        ]
    return [{"params": given}]


def _checked(value: object, location: Location) -> Parameter:
    if isinstance(value, Parameter):
        return value
    raise _invalid(
        f"an optimizer of a session trains its parameters, and not a {type(value).__name__}; make "
        "one with session.parameter(tensor), or of a module's with session.trainable(module)",
        location,
    )


def _stand_in(value: Parameter) -> torch.nn.Parameter:
    """Gives what torch may look at: a tensor of the same shape, without elements."""
    shape, dtype = ((), torch.float32) if value._meta is None else (value._meta.shape, value.dtype)
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _invalid(message: str, location: Location) -> Error:
    return error(Reason.MALFORMED_SESSION, message, location=location)

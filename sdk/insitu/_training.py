"""What is trained inside a session: parameters, and the user's modules made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu._origin import Moment, Origin, latest, not_here
from insitu._proxy import Proxy, as_meta, proxies_in, wrap
from insitu._proxy_structures import ProxyDict
from insitu._shapes import check_fits
from insitu._source import user_location
from insitu_proto.v1 import training_pb2
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insitu._recorder import SessionRecorder
    from insitu_wire.errors import Error, Location


class Parameter(Proxy):
    """A tensor that lives where the session runs, as long as it does, and is trained there.

    `loss.backward()` adds to its `.grad`, as in torch; the optimizers of `insitu.optim` change it.
    """

    _is_parameter = True
    _last_saved: Proxy | None = None

    def save(self) -> Proxy:  # type: ignore[override]
        """Marks the value that it has here to come back; this object becomes the last of those."""
        if self._last_saved is not None:
            self._last_saved._also = None
        self._last_saved = Proxy.make(self._origin, self._meta)
        self._last_saved._also = self
        return self._last_saved.save()

    @property
    def grad(self) -> Proxy:
        """What backward passes have added up since it was last cleared. Assigning replaces it."""
        location = user_location()
        block = _block_of(self)
        block.end_backward()
        message = training_pb2.ReadGradient(parameter=_encoded(self, location))
        node_id = block.train(message, location)
        return Proxy.make(_made(self, f"{self._origin.description}.grad", node_id), self._meta)

    @grad.setter
    def grad(self, value: object) -> None:
        location = user_location()
        if value is not None:
            check_fits(self._meta, as_meta(value), f".grad of {self._origin}", location)
        block = _block_of(self)
        block.end_backward()
        message = training_pb2.WriteGradient(parameter=_encoded(self, location))
        message.gradient.CopyFrom(self._origin.recorder.encode(value, location))
        block.train(message, location)

    def update(self, value: torch.Tensor) -> None:
        """Gives it other elements, from here on; its gradient stays."""
        location = user_location()
        check_fits(self._meta, as_meta(value), str(self._origin), location)
        block = _block_of(self)
        block.end_backward()
        block.assign(self._origin.id(), value, location)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """True: it is trained."""
        return True

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """Not told: who asks is an optimizer of torch."""
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            "an optimizer of torch.optim would run here, and the parameters are where the session "
            "runs; use the one of the same name in insitu.optim",
            location=user_location(),
        )


class Trained:
    """Parameters of a session that have names, and are trained together."""

    _parameters: dict[str, Parameter]

    def parameters(self) -> Iterator[Parameter]:
        """Yields what is trained, for an optimizer."""
        yield from self._parameters.values()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yields what is trained, by name."""
        yield from self._parameters.items()

    def state_dict(self) -> ProxyDict:
        """Gives what is trained as it is here: save it to have tensors, by their names."""
        values = {name: Proxy.make(at._origin, at._meta) for name, at in self._parameters.items()}
        found = ProxyDict(values)
        found._origin = next(self.parameters())._origin
        return found


class Trainable(Trained):
    """A module of the user's whose parameters are trained inside a session.

    Called on values of the session, it records its `forward`. The module itself stays as it is:
    save the `state_dict`, and load it into the module after the session.
    """

    def __init__(self, recorder: SessionRecorder, module: torch.nn.Module) -> None:
        self._module = module
        self._parameters = {
            name: parameter(recorder, tensor)
            for name, tensor in module.named_parameters()
            if tensor.requires_grad
        }
        if not self._parameters:
            raise _invalid(
                f"{type(module).__name__} has no parameter that requires a gradient, so that there "
                "is nothing to train; call requires_grad_() on it",
                user_location(),
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the module."""
        return torch.func.functional_call(self._module, {**self._parameters}, args, kwargs)


def parameter(recorder: SessionRecorder, value: torch.Tensor) -> Parameter:
    """Makes a parameter out of a tensor: the user's own, or one of the session."""
    location = user_location()
    meta = as_meta(value)
    if not isinstance(value, torch.Tensor) or (
        isinstance(meta, torch.Tensor) and not meta.is_floating_point()
    ):
        what = f"{meta.dtype} elements" if isinstance(meta, torch.Tensor) else type(value).__name__
        raise _invalid(
            f"a parameter is a tensor of floating-point elements, and not {what}; use "
            "torch.zeros(...), or .float()",
            location,
        )
    block = recorder.block
    message = training_pb2.Parameter(value=recorder.encode(value, location))
    node_id = block.train(message, location)
    used = (proxy._origin for proxy in proxies_in(value))
    moment = latest(used, block.number)
    origin = Origin(recorder, location, "a parameter", node_id, moment=moment, scope=recorder.scope)
    made: Parameter = wrap(meta, origin, Parameter)
    return made


def encoded_list(parameters: Sequence[Parameter], location: Location) -> Any:
    """Encodes parameters as a list of references."""
    return parameters[0]._origin.recorder.encode(list(parameters), location)


def _encoded(value: Parameter, location: Location) -> Any:
    return value._origin.recorder.encode(value, location)


def _block_of(value: Parameter) -> Any:
    if value._origin.recorder.state != "recording":
        raise not_here(value._origin)
    return value._origin.recorder.block


def _made(value: Parameter, description: str, node_id: int) -> Origin:
    recorder = value._origin.recorder
    moment = Moment(recorder.block.number)
    return Origin(
        recorder, user_location(), description, node_id, moment=moment, scope=recorder.scope
    )


def _invalid(message: str, location: Location) -> Error:
    return error(Reason.MALFORMED_SESSION, message, location=location)

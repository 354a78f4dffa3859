"""Backward passes: `loss.backward()`, and what `.grad` of a value is in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu._origin import Moment, Origin, latest, not_here
from insitu._source import user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from insitu._proxy import Proxy
    from insitu._recorder import BlockRecorder
    from insitu_wire.errors import Error, Location


class Backward:
    """One backward pass of a trace: gradients that are read from now on are of its loss.

    As a `with` block it holds inside the block only.
    """

    def __init__(self, block: BlockRecorder, loss: Proxy, gradient: torch.Tensor | None) -> None:
        self.loss = loss
        self.gradient = gradient
        self._block = block
        self._before = block.backward
        block.backward = self

    def __enter__(self) -> Backward:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.backward = self._before


def backward(
    loss: Proxy, gradient: torch.Tensor | None, *, create_graph: bool, inputs: object
) -> Backward:
    """Begins a backward pass.

    Args:
        loss: what is differentiated: one element, unless `gradient` is given.
        gradient: the gradient of the loss itself, of its shape.
        create_graph: must be False.
        inputs: must be None.
    """
    location = user_location()
    block = _trace_of(loss, "backward()", location)
    if create_graph or inputs is not None:
        given = "create_graph" if create_graph else "inputs"
        raise _invalid(
            f"backward({given}=...) does not run inside a trace; read .grad of the values that you "
            "want gradients of",
            location,
        )
    _check_differentiable(loss, "backward()", location)
    if gradient is None and loss._meta is not None and loss._meta.numel() != 1:
        raise _invalid(
            f"backward() of {loss._origin}, which is {list(loss._meta.shape)}; reduce it to one "
            "element first, as with .sum() or .mean(), or give backward(gradient) its gradient",
            location,
        )
    if gradient is not None and loss._meta is not None and gradient.shape != loss._meta.shape:
        raise error(
            Reason.SHAPE_MISMATCH,
            f"the gradient given to backward() is {list(gradient.shape)} and the loss "
            f"{list(loss._meta.shape)}; they must be of one shape",
            location=location,
        )
    return Backward(block, loss, gradient)


def gradient_by(value: Proxy) -> tuple[Origin, torch.Tensor | None]:
    """Records the gradient of the last backward pass's loss with respect to a value."""
    location = user_location()
    block = _trace_of(value, ".grad", location)
    if block.backward is None:
        raise _invalid(
            f".grad of {value._origin} before any backward pass; call loss.backward() before, or "
            "read it inside `with loss.backward():`",
            location,
        )
    _check_differentiable(value, ".grad", location)
    node_id = block.gradient(block.backward, value, location)
    origins = (block.backward.loss._origin, value._origin)
    reached = latest(origins, block.number)
    origin = Origin(
        value._origin.recorder,
        location,
        f"{value._origin.description}.grad",
        node_id,
        moment=Moment(block.number, reached.reached_at, reached.waits_for),
        scope=value._origin.recorder.scope,
    )
    return origin, value._meta


def _trace_of(value: Proxy, what: str, location: Location) -> BlockRecorder:
    """Gives the open trace, which must be the one that makes the value."""
    recorder = value._origin.recorder
    if recorder.state != "recording":
        raise not_here(value._origin)
    block = recorder.trace
    if block is not None and block.max_new_tokens:
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            f"{what} of {value._origin} in a trace that generates, which runs without a graph; "
            "take gradients in a `with model.trace(...)` block over the ids that were generated",
            location=location,
        )
    if block is None or value._origin.moment.block_number != block.number:
        raise _invalid(
            f"{what} of {value._origin} outside the trace that makes it; a graph lives as long as "
            "its trace: take gradients there, and use them where you like",
            location,
        )
    return block


def _check_differentiable(value: Proxy, what: str, location: Location) -> None:
    meta: Any = value._meta
    if meta is not None and not (meta.is_floating_point() or meta.is_complex()):
        name = str(meta.dtype).removeprefix("torch.")
        raise _invalid(
            f"{what} of {value._origin}, whose elements are {name}; only floating-point values "
            "have gradients",
            location,
        )


def _invalid(message: str, location: Location) -> Error:
    return error(Reason.MALFORMED_SESSION, message, location=location)

"""Backward passes: `loss.backward()`, and what `.grad` of a value is in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from insitu._origin import Moment, NodeReference, Origin, latest, not_here
from insitu._proxy import as_meta
from insitu._shapes import check_fits
from insitu._source import user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from insitu._block_recorder import BlockRecorder
    from insitu._proxy import Proxy
    from insitu_wire.errors import Error, Location


class Backward:
    """One backward pass of a trace: gradients that are read from now on are of its loss.

    As a `with` block it holds inside the block only.

    Attributes:
        loss: what is differentiated.
        gradient: the gradient of the loss itself; None for 1.
        written: what the user has put in the place of gradients, with the values that they are by.
        location: where it was called.
        condition: number of the trace's condition that it is under.
    """

    def __init__(
        self,
        block: BlockRecorder,
        loss: Proxy,
        gradient: torch.Tensor | None,
        location: Location,
    ) -> None:
        self.loss = loss
        self.gradient = gradient
        self.written: dict[int, tuple[Proxy, object]] = {}
        self.location = location
        self.condition = block.condition
        self._block = block
        self._is_over = False
        block.end_backward()
        self._before = block.backward
        block.backward = self

    def end(self) -> None:
        """Adds its gradients to those of the parameters that the block has used."""
        if not self._is_over:
            self._is_over = True
            self._block.add_to_parameters(self)

    def write(self, value: Proxy, gradient: object, location: Location) -> None:
        """Has the pass go on with another gradient at a value."""
        if self._is_over:
            raise _invalid(
                f".grad of {value._origin} is written to after its backward pass was over; write "
                "to it inside `with loss.backward():`, or before the next backward pass or step of "
                "an optimizer",
                location,
            )
        self.written[value._origin.id()] = (value, gradient)

    def __enter__(self) -> Backward:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.end()
        self._block.backward = self._before


@dataclass(frozen=True, slots=True)
class GradientRead:
    """A gradient that was read: what is written into it is written to the pass."""

    backward: Backward
    value: Proxy
    node_id: int

    def is_written(self, location: Location) -> None:
        """Takes note that the gradient was changed in place."""
        self.backward.write(self.value, NodeReference(self.node_id), location)


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
    return Backward(block, loss, gradient, location)


def gradient_by(value: Proxy) -> tuple[Origin, torch.Tensor | None]:
    """Records the gradient of the last backward pass's loss with respect to a value."""
    location = user_location()
    block, backward = _pass_of(value, location)
    node_id = block.gradient(backward, value, location)
    origins = (backward.loss._origin, value._origin)
    reached = latest(origins, block.number)
    origin = Origin(
        value._origin.recorder,
        location,
        f"{value._origin.description}.grad",
        node_id,
        moment=Moment(block.number, reached.reached_at, reached.waits_for),
        scope=value._origin.recorder.scope,
        gradient=GradientRead(backward, value, node_id),
    )
    return origin, value._meta


def write_gradient(value: Proxy, gradient: object) -> None:
    """Has the last backward pass go on with another gradient at a value."""
    location = user_location()
    _, backward = _pass_of(value, location)
    check_fits(value._meta, as_meta(gradient), f".grad of {value._origin}", location)
    backward.write(value, gradient, location)


def _pass_of(value: Proxy, location: Location) -> tuple[BlockRecorder, Backward]:
    """Gives the open trace and its last backward pass."""
    block = _trace_of(value, ".grad", location)
    if block.backward is None:
        raise _invalid(
            f".grad of {value._origin} before any backward pass; call loss.backward() before, or "
            "read it inside `with loss.backward():`",
            location,
        )
    _check_differentiable(value, ".grad", location)
    return block, block.backward


def _trace_of(value: Proxy, what: str, location: Location) -> BlockRecorder:
    """Gives the open trace, which must be the one that makes the value."""
    recorder = value._origin.recorder
    if recorder.state != "recording":
        raise not_here(value._origin)
    block = recorder.open_block
    if block is not None and block.max_new_tokens:
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            f"{what} of {value._origin} in a trace that generates, which runs without a graph; "
            "take gradients in a `with model.trace(...)` block over the ids that were generated",
            location=location,
        )
    if block is None or value._origin.moment.block_number != block.number:
        raise _invalid(
            f"{what} of {value._origin} outside the trace that makes it, or after another step "
            "than computing; a graph lives as long as its trace: take gradients there, and use "
            "them where you like",
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

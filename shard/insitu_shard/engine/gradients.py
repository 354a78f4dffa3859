"""Takes the gradients that a trace asks for, by autograd, and keeps a graph for these only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.graph import Ref
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from insitu_shard.engine.boundary_value import InputValue, OutputValue
    from insitu_shard.engine.differentiated import Differentiated
    from insitu_shard.engine.graph import Boundary, Gradient, Node, NodeId


class Gradients:
    """The gradients of one run of a trace.

    The graph begins at the earliest value that a gradient is taken by: parameters have none, and
    what comes before runs as ever.
    """

    def __init__(self, wanted: Differentiated) -> None:
        self._wanted = wanted
        self._taken: dict[NodeId, torch.Tensor | None] = {}

    def shown(
        self, boundary: Boundary, whole: InputValue | OutputValue, *, is_written: bool
    ) -> InputValue | OutputValue:
        """Gives what nodes see, and the model goes on with, at a boundary.

        Args:
            boundary: the boundary.
            whole: what the model holds.
            is_written: whether nodes write there: a graph may need what was there before.
        """
        begins = boundary in self._wanted.boundaries

        def shown(tensor: torch.Tensor) -> torch.Tensor:
            if begins and not tensor.requires_grad and tensor.is_floating_point():
                tensor = tensor.detach().requires_grad_()
            return tensor.clone() if tensor.requires_grad and (begins or is_written) else tensor

        return whole.holding(pytree.tree_map_only(torch.Tensor, shown, whole.raw))

    def begun(self, node: Node, value: object) -> object:
        """Gives the value of a node, where the graph begins if a gradient is taken by it."""
        if node.id not in self._wanted.values or not isinstance(value, torch.Tensor):
            return value
        if value.requires_grad or not value.is_floating_point():
            return value
        return value.detach().requires_grad_()

    def take(self, node: Node, value_of: Callable[[NodeId], object]) -> torch.Tensor:
        """Gives a gradient.

        Those of one loss are taken together, as far as their values are there.

        Args:
            node: the gradient's node.
            value_of: gives the value of a node.

        Raises:
            Error: INTERVENTION_RAISED, if the loss does not depend on the value.
        """
        if node.id not in self._taken:
            self._take_all_of(self._wanted.gradients[node.id], value_of)
        gradient = self._taken.get(node.id)
        if gradient is None:
            raise error(
                Reason.INTERVENTION_RAISED,
                "the loss does not depend on this value. A part of a value, such as hidden[:, -1], "
                "is a value of its own: take the gradient of the whole, and its part, as in "
                "hidden.grad[:, -1]",
                location=node.location,
            )
        return gradient

    def _take_all_of(self, of: Gradient, value_of: Callable[[NodeId], object]) -> None:
        alike = {
            node_id: gradient.value.node_id
            for node_id, gradient in self._wanted.gradients.items()
            if (gradient.loss, gradient.gradient) == (of.loss, of.gradient)
            and isinstance(gradient.value, Ref)
            and node_id not in self._taken
        }
        values = {node_id: value_of(used) for node_id, used in alike.items()}
        ready = {
            key: at
            for key, at in values.items()
            if isinstance(at, torch.Tensor) and at.requires_grad
        }
        assert isinstance(of.loss, Ref)
        loss: Any = value_of(of.loss.node_id)
        own: Any = value_of(of.gradient.node_id) if isinstance(of.gradient, Ref) else of.gradient
        if not ready or not loss.requires_grad:
            return
        found = torch.autograd.grad(
            loss, list(ready.values()), own, retain_graph=True, allow_unused=True
        )
        self._taken.update(zip(ready, found, strict=True))


def detached(value: Any) -> Any:
    """Gives a value without its graph, which may outlive the trace."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)

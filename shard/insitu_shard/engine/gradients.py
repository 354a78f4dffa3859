"""Takes the gradients that a trace asks for, by autograd, and keeps a graph for these only."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.graph import Ref
from insitu_shard.engine.training import parameter_of
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from insitu_shard.engine.boundary_value import InputValue, OutputValue
    from insitu_shard.engine.differentiated import Differentiated
    from insitu_shard.engine.graph import Boundary, Gradient, Node, NodeId
    from insitu_shard.engine.training import ParameterValue
    from insitu_shard.engine.training_graph import Backward


class Gradients:
    """The gradients of one run of a block.

    The graph begins at the earliest value that a gradient is taken by, and where parameters come
    in: the model's weights have none, and what comes before runs as ever.
    """

    def __init__(self, wanted: Differentiated) -> None:
        self._wanted = wanted
        self._taken: dict[NodeId, torch.Tensor | None] = {}
        self._of_parameters: dict[NodeId, list[tuple[ParameterValue, torch.Tensor | None]]] = {}

    def is_trained(self, node_id: NodeId) -> bool:
        """Whether a node makes a parameter that gets gradients."""
        return node_id in self._wanted.parameters

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

        Those of one backward pass are taken together, as far as their values are there.

        Args:
            node: the gradient's node.
            value_of: gives the value of a node; a parameter's is what `Backward` adds to.

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

    def add_to_parameters(self, node: Node, value_of: Callable[[NodeId], object]) -> None:
        """Adds the gradients of a backward pass to what parameters have.

        Args:
            node: the backward pass's node.
            value_of: as for `take`.

        Raises:
            Error: INTERVENTION_RAISED, if the loss depends on nothing that gradients are taken by.
        """
        if node.id not in self._of_parameters:
            self._take_all_of(self._wanted.backwards[node.id], value_of)
        found = self._of_parameters.pop(node.id, [])
        if not any(gradient is not None for _, gradient in found) and not self._is_read(node):
            raise error(
                Reason.INTERVENTION_RAISED,
                "the loss depends on no parameter of the session, so that there is nothing to "
                "train: use the parameters on the way to it",
                location=node.location,
            )
        for parameter, gradient in found:
            if gradient is not None:
                parameter.add_gradient(gradient)

    def _is_read(self, node: Node) -> bool:
        of = _pass_of(self._wanted.backwards[node.id])[:2]
        return any(_pass_of(each)[:2] == of for each in self._wanted.gradients.values())

    def _take_all_of(self, of: Gradient | Backward, value_of: Callable[[NodeId], object]) -> None:
        written = [(value_of(id_of(at)), _valued(new, value_of)) for at, new in of.written]
        by_place = {id(at): new for at, new in written}
        sought: list[torch.Tensor] = []
        places: list[NodeId] = []
        for node_id in self._like(of):
            at = value_of(id_of(self._wanted.gradients[node_id].value))
            if id(at) in by_place:
                self._taken[node_id] = _as_gradient(by_place[id(at)], at)
            elif isinstance(at, torch.Tensor) and at.requires_grad:
                sought.append(at)
                places.append(node_id)
        backwards = [
            node_id
            for node_id, each in self._wanted.backwards.items()
            if _pass_of(each) == _pass_of(of) and node_id not in self._of_parameters
        ]
        parameters = {
            node_id: [parameter_of(value_of(id_of(at))) for at in each.parameters]
            for node_id in backwards
            for each in [self._wanted.backwards[node_id]]
        }
        leaves = {id(p): p.leaf for each in parameters.values() for p in each}
        inputs = [*sought, *leaves.values()]
        own = _valued(of.gradient, value_of)
        found = self._found(value_of(id_of(of.loss)), inputs, own, written)
        self._taken.update(zip(places, found[: len(sought)], strict=True))
        by_leaf = dict(zip(leaves, found[len(sought) :], strict=True))
        for node_id, each in parameters.items():
            self._of_parameters[node_id] = [(p, by_leaf[id(p)]) for p in each]

    def _like(self, of: Gradient | Backward) -> list[NodeId]:
        """Gives the gradients of a pass that have not been taken."""
        return [
            node_id
            for node_id, each in self._wanted.gradients.items()
            if _pass_of(each) == _pass_of(of) and node_id not in self._taken
        ]

    def _found(
        self,
        loss: object,
        inputs: list[torch.Tensor],
        own: Any,
        written: list[tuple[object, object]],
    ) -> Sequence[torch.Tensor | None]:
        if not inputs or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return [None] * len(inputs)
        with ExitStack() as hooks:
            for at, new in written:
                if isinstance(at, torch.Tensor) and at.requires_grad:
                    replace = partial(_replace, _as_gradient(new, at))
                    hooks.callback(at.register_hook(replace).remove)
            return torch.autograd.grad(loss, inputs, own, retain_graph=True, allow_unused=True)


def _pass_of(taken: Gradient | Backward) -> tuple[object, ...]:
    """Gives what gradients of one backward pass have in common."""
    written = tuple((at, _identity(new)) for at, new in taken.written)
    return taken.loss, _identity(taken.gradient), written


def _identity(value: object) -> object:
    return id(value) if isinstance(value, torch.Tensor) else value


def _valued(value: object, value_of: Callable[[NodeId], object]) -> object:
    return value_of(value.node_id) if isinstance(value, Ref) else value


def id_of(reference: object) -> NodeId:
    """Gives the node that a reference names."""
    assert isinstance(reference, Ref)
    return reference.node_id


def _replace(gradient: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return gradient


def _as_gradient(value: object, of: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.shape != of.shape:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise error(
            Reason.SHAPE_MISMATCH,
            f"the gradient of this value is {list(of.shape)} and can not be replaced by {shape}",
            expected=list(of.shape),
            actual=shape,
        )
    return value.detach().to(of.dtype)


def detached(value: Any) -> Any:
    """Gives a value without its graph, which may outlive the trace."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)

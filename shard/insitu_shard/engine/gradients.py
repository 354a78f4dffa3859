"""Takes the gradients that a trace asks for, by autograd, and keeps a graph for these only."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from insitu_shard.engine.differentiated import pass_of
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a backward pass is to give."""

    loss: Any
    gradient: Any
    """The gradient of the loss itself; None for 1."""
    inputs: list[torch.Tensor]
    """What gradients are taken by."""
    nodes: list[NodeId]
    """The gradients' nodes, as far as they are not of parameters."""
    written: list[tuple[object, object]]
    """Values, and the gradients that the pass goes on with there."""


class Gradients:
    """The gradients of one run of a block.

    The graph begins at the earliest value that a gradient is taken by, and where parameters come
    in: the model's weights have none, and what comes before runs as ever.
    """

    def __init__(self, wanted: Differentiated, *, shares_pass: bool = False) -> None:
        """Makes them.

        Args:
            wanted: what they are taken by.
            shares_pass: whether what the model holds may have the graphs of other traces.
        """
        self._wanted = wanted
        self._shares_pass = shares_pass
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
            if self._shares_pass or begins or is_written:
                return tensor.clone() if tensor.requires_grad else tensor
            return tensor

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

    def asked(self, value_of: Callable[[NodeId], object]) -> Asked:
        """Gives what its one backward pass is to give, for it to be taken with others.

        Args:
            value_of: as for `take`.

        Raises:
            Error: SHAPE_MISMATCH, if a gradient was written that does not fit.
        """
        return self._asked(next(iter(self._wanted.gradients.values())), value_of)

    def answer(self, asked: Asked, found: Sequence[torch.Tensor | None]) -> None:
        """Takes what a backward pass gave.

        Args:
            asked: what it was asked for.
            found: a gradient for each of its inputs.
        """
        self._taken.update(zip(asked.nodes, found, strict=False))

    def _is_read(self, node: Node) -> bool:
        of = pass_of(self._wanted.backwards[node.id])[:2]
        return any(pass_of(each)[:2] == of for each in self._wanted.gradients.values())

    def _take_all_of(self, of: Gradient | Backward, value_of: Callable[[NodeId], object]) -> None:
        asked = self._asked(of, value_of)
        backwards = [
            node_id
            for node_id, each in self._wanted.backwards.items()
            if pass_of(each) == pass_of(of) and node_id not in self._of_parameters
        ]
        parameters = {
            node_id: [parameter_of(value_of(id_of(at))) for at in each.parameters]
            for node_id in backwards
            for each in [self._wanted.backwards[node_id]]
        }
        leaves = {id(p): p.leaf for each in parameters.values() for p in each}
        asked.inputs.extend(leaves.values())
        found = gradients_of([asked])
        self.answer(asked, found)
        by_leaf = dict(zip(leaves, found[len(asked.nodes) :], strict=True))
        for node_id, each in parameters.items():
            self._of_parameters[node_id] = [(p, by_leaf[id(p)]) for p in each]

    def _asked(self, of: Gradient | Backward, value_of: Callable[[NodeId], object]) -> Asked:
        """Gives what the pass is to give that has not been taken; what is written is known."""
        written = [(value_of(id_of(at)), _valued(new, value_of)) for at, new in of.written]
        by_place = {id(at): new for at, new in written}
        asked = Asked(
            value_of(id_of(of.loss)), _valued(of.gradient, value_of), [], [], written
        )  # fmt: skip
        for node_id in self._like(of):
            at = value_of(id_of(self._wanted.gradients[node_id].value))
            if id(at) in by_place:
                self._taken[node_id] = _as_gradient(by_place[id(at)], at)
            elif isinstance(at, torch.Tensor) and at.requires_grad:
                asked.inputs.append(at)
                asked.nodes.append(node_id)
        return asked

    def _like(self, of: Gradient | Backward) -> list[NodeId]:
        """Gives the gradients of a pass that have not been taken."""
        return [
            node_id
            for node_id, each in self._wanted.gradients.items()
            if pass_of(each) == pass_of(of) and node_id not in self._taken
        ]


def gradients_of(several: Sequence[Asked]) -> Sequence[torch.Tensor | None]:
    """Runs one backward pass; gives a gradient for each input, one list after the other.

    Args:
        several: what is asked for: losses that do not depend on inputs of each other.
    """
    inputs = [tensor for asked in several for tensor in asked.inputs]
    losses = [asked.loss for asked in several]
    if not inputs or not all(isinstance(at, torch.Tensor) and at.requires_grad for at in losses):
        return [None] * len(inputs)
    with ExitStack() as hooks:
        for at, new in (pair for asked in several for pair in asked.written):
            if isinstance(at, torch.Tensor) and at.requires_grad:
                replace = partial(_replace, _as_gradient(new, at))
                hooks.callback(at.register_hook(replace).remove)
        own = [asked.gradient for asked in several]
        return torch.autograd.grad(losses, inputs, own, retain_graph=True, allow_unused=True)


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

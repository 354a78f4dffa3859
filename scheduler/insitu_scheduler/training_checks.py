"""Checks gradients, parameters and optimizers of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_scheduler.refusals import malformed
from insitu_wire.errors import Reason, error
from insitu_wire.optimizers import OPTIMIZERS, problem
from insitu_wire.steps import values_of
from insitu_wire.values import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.training_pb2 import GradientWrite, OptimizerStep
    from insitu_proto.v1.value_pb2 import Value
    from insitu_scheduler.value_checks import ValueChecker

KINDS = (
    "gradient",
    "parameter",
    "backward",
    "read_gradient",
    "write_gradient",
    "zero_gradient",
    "optimizer",
    "optimizer_step",
)
"""Kinds of nodes that are checked here."""
_MAX_NAME = 40


class TrainingChecker:
    """Checks what trains in one session."""

    def __init__(self, values: ValueChecker, kinds: Mapping[int, str]) -> None:
        """Makes the checker.

        Args:
            values: checks the values among the arguments.
            kinds: what the nodes before are, by id; it grows.
        """
        self._values = values
        self._kinds = kinds
        self._owner = ""
        self._optimizers: dict[int, str] = {}

    def check(self, node: Node, owner: str) -> None:
        """Checks a node of one of the kinds; `owner` is named in errors.

        Raises:
            Error: what is wrong with it.
        """
        self._owner = owner
        for value in values_of(node):
            if value.WhichOneof("kind") is not None:
                self._values.check(value, owner)
        match node.WhichOneof("operation"):
            case "gradient":
                self._check_references(node.gradient.loss, node.gradient.value)
                self._check_written(node.gradient.written)
            case "backward":
                self._check_references(node.backward.loss)
                self._check_parameters(node.backward.parameters)
                self._check_written(node.backward.written)
            case "parameter" if node.parameter.value.WhichOneof("kind") is None:
                raise malformed(f"{owner} is a parameter without a value; give it a tensor")
            case "read_gradient" | "write_gradient" as kind:
                self._check_kind(getattr(node, kind).parameter, "parameter")
            case "zero_gradient":
                self._check_parameters(node.zero_gradient.parameters)
            case "optimizer":
                self._check_name(node.optimizer.name)
                self._optimizers[node.id] = node.optimizer.name
            case "optimizer_step":
                self._check_step(node.optimizer_step)

    def _check_references(self, *values: Value) -> None:
        if not all(value.HasField("reference") for value in values):
            raise malformed(
                f"{self._owner} is a gradient, and its loss or its value is no reference; refer "
                "to the nodes that made them"
            )

    def _check_written(self, written: Iterable[GradientWrite]) -> None:
        for write in written:
            self._check_references(write.value)
            if write.gradient.WhichOneof("kind") is None:
                raise malformed(f"{self._owner} writes a gradient that has no value")

    def _check_parameters(self, value: Value) -> None:
        if not value.list.items:
            raise malformed(f"{self._owner} names no parameters; give it a list of them")
        for item in value.list.items:
            self._check_kind(item, "parameter")

    def _check_kind(self, value: Value, wanted: str) -> None:
        kind = self._kinds.get(value.reference.node_id) if value.HasField("reference") else None
        if kind != wanted:
            raise malformed(
                f"{self._owner} trains {'no reference' if kind is None else f'a {kind}'}; refer to "
                f"the node of {'an' if wanted == 'optimizer' else 'a'} {wanted}"
            )

    def _check_name(self, name: str) -> None:
        if name not in OPTIMIZERS:
            raise error(
                Reason.UNKNOWN_OPERATION,
                f"{self._owner} is the optimizer {name[:_MAX_NAME]!r}, which is not there; use "
                f"{', '.join(OPTIMIZERS)}",
                operation=name[:_MAX_NAME],
            )

    def _check_step(self, step: OptimizerStep) -> None:
        self._check_kind(step.optimizer, "optimizer")
        name = self._optimizers[step.optimizer.reference.node_id]
        if not step.groups:
            raise malformed(f"{self._owner} is a step without parameters; give it a group of them")
        seen: set[int] = set()
        for group in step.groups:
            self._check_parameters(group.parameters)
            ids = [item.reference.node_id for item in group.parameters.list.items]
            if len(set(ids)) < len(ids) or not seen.isdisjoint(ids):
                raise malformed(f"{self._owner} has one parameter twice; name each once")
            seen.update(ids)
            self._check_options(name, group.options)

    def _check_options(self, name: str, options: Mapping[str, Value]) -> None:
        values = {option: decode(value, _no_leaf) for option, value in options.items()}
        if wrong := problem(name, values):
            raise malformed(f"{self._owner}: {wrong}")


def _no_leaf(_: Value) -> object:
    return None

"""Checks single operations of a session: hook points, calls, and what they are called with."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from insitu_proto.v1.intervention_pb2 import HookSide
from insitu_scheduler.refusals import malformed, unsupported
from insitu_scheduler.training_checks import KINDS, TrainingChecker
from insitu_wire import operations
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from insitu_proto.v1.intervention_pb2 import Call, HookPoint, Node
    from insitu_proto.v1.value_pb2 import Value
    from insitu_scheduler.models import KnownModel
    from insitu_scheduler.value_checks import ValueChecker

# Errors travel in HTTP/2 headers, which take a few kilobytes.
MAX_QUOTED = 200
_MAX_HANDLE = 64


class OperationChecker:
    """Checks the operations of one session's nodes."""

    def __init__(
        self,
        values: ValueChecker,
        check_reference: Callable[[int], None],
        kinds: Mapping[int, str],
    ) -> None:
        """Makes the checker.

        Args:
            values: checks the values among their arguments.
            check_reference: raises if the value of a node can not be used.
            kinds: what the nodes before are, by id; it grows.
        """
        self._values = values
        self._training = TrainingChecker(values, kinds)
        self._check_reference = check_reference
        self._owner = ""
        self._num_invokes = 0

    def check(  # noqa: C901 - one case a kind
        self, node: Node, model: KnownModel | None, num_invokes: int
    ) -> None:
        """Checks a node's operation.

        Args:
            node: the node.
            model: the model that it names modules of; None where there is none.
            num_invokes: how many invokes its trace has.

        Raises:
            Error: what is wrong with it.
        """
        self._owner = f"node {node.id}"
        self._num_invokes = num_invokes
        match node.WhichOneof("operation"):
            case "read":
                self._check_hook_point(node.read.hook_point, model)
            case "write":
                self._check_hook_point(node.write.hook_point, model)
                self._check_values([node.write.value])
            case "call":
                self._check_call(node.call)
            case "module_call":
                self._check_path(node.module_call.module_path, model)
                self._check_arguments(node.module_call.args, node.module_call.kwargs)
            case "save":
                self._check_values([node.save.value])
            case "log":
                self._check_values(node.log.values)
            case "assign":
                self._check_reference(node.assign.node_id)
                self._check_values([node.assign.value])
            case "stop" | "generated":
                return
            case "end_generation":
                self._check_values([node.end_generation.when])
            case "keep":
                self._check_handle(node.keep.handle_id)
                self._check_values([node.keep.value])
            case "load":
                self._check_handle(node.load.handle_id)
            case "skip":
                self._check_path(node.skip.module_path, model)
                self._check_values([node.skip.value])
            case kind if kind in KINDS:
                self._training.check(node, self._owner)
            case None:
                raise unsupported(f"{self._owner} is an operation that it does not know")
            case kind:
                raise unsupported(f"{self._owner} is a {kind}, which it can not run yet")

    def _check_handle(self, handle_id: str) -> None:
        if not 16 <= len(handle_id) <= _MAX_HANDLE or not handle_id.isalnum():
            raise malformed(
                f"{self._owner} names the handle {handle_id[:_MAX_HANDLE]!r}; a handle is 16 to "
                f"{_MAX_HANDLE} letters and digits, drawn at random"
            )

    def _check_hook_point(self, hook_point: HookPoint, model: KnownModel | None) -> None:
        if hook_point.invoke > self._num_invokes:
            raise malformed(
                f"{self._owner} names invoke {hook_point.invoke}, and the trace has "
                f"{self._num_invokes}"
            )
        if hook_point.side == HookSide.HOOK_SIDE_UNSPECIFIED:
            raise malformed(f"{self._owner} names no side; use input, inputs or output")
        if hook_point.side not in HookSide.values():
            raise unsupported(f"{self._owner} names side {hook_point.side}, which it does not know")
        self._check_path(hook_point.module_path, model)

    def _check_path(self, path: str, model: KnownModel | None) -> None:
        if model is None:
            raise malformed(f"{self._owner} calls a module in a computation that names no model")
        if path in model.module_paths:
            return
        path = path[:MAX_QUOTED]
        nearest = difflib.get_close_matches(path, model.module_paths, n=3)
        hint = f"the nearest are {', '.join(nearest)}" if nearest else "print(model) shows them all"
        raise error(
            Reason.UNKNOWN_MODULE_PATH,
            f"{model.description.name} has no module {path!r}; {hint}",
            modulePath=path,
            model=model.description.name,
            nearest=", ".join(nearest),
        )

    def _check_call(self, call: Call) -> None:
        if call.name not in operations.OPERATIONS:
            name = call.name[:MAX_QUOTED]
            nearest = ", ".join(operations.nearest(name))
            hint = f"the nearest are {nearest}" if nearest else "none in the table is like it"
            raise error(
                Reason.UNKNOWN_OPERATION,
                f"{name!r} is not an operation that may run on the server; {hint}",
                operation=name,
                nearest=nearest,
            )
        self._check_arguments(call.args, call.kwargs)
        if operations.is_in_place(call.name) and not call.args:
            raise malformed(f"{self._owner} writes in place and has no first argument to write to")
        args = [_plain(value) for value in call.args]
        kwargs = {name: _plain(value) for name, value in call.kwargs.items()}
        if option := operations.writing_option(call.name, args, kwargs):
            raise error(
                Reason.UNKNOWN_OPERATION,
                f"{call.name} of {self._owner} with {option} would write into its arguments; use "
                "its result, or an operation that says in its name that it writes",
                operation=call.name,
            )

    def _check_arguments(self, args: Iterable[Value], kwargs: Mapping[str, Value]) -> None:
        self._check_values(args)
        self._check_values(kwargs.values())

    def _check_values(self, values: Iterable[Value]) -> None:
        for value in values:
            self._values.check(value, self._owner)


def _plain(value: Value) -> object:
    """Gives None and bools as such, for it matters which; anything else as it came."""
    match value.WhichOneof("kind"):
        case "none":
            return None
        case "bool_value":
            return value.bool_value
    return value

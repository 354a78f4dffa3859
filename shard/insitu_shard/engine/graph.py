"""A trace as the engine sees it: nodes that refer to each other by id."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from insitu_wire.errors import Location

NodeId = int


class Side(Enum):
    """On which side of a module's call a hook point is."""

    INPUT = "input"
    INPUTS = "inputs"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A place in the forward pass where values can be read and written."""

    module_path: str
    side: Side
    call_index: int = 0

    @property
    def boundary(self) -> Boundary:
        """The moment of the forward pass that the hook point belongs to."""
        return Boundary(self.module_path, self.side is not Side.OUTPUT, self.call_index)

    def __str__(self) -> str:
        call = f" (call {self.call_index})" if self.call_index else ""
        return f"{self.module_path or 'model'}.{self.side.value}{call}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """The moment before or after a module's call; `.input` and `.inputs` share one."""

    module_path: str
    is_input: bool
    call_index: int


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value of a node."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Read:
    """Gives the value at a hook point."""

    hook_point: HookPoint


@dataclass(frozen=True, slots=True)
class Write:
    """Replaces the value at a hook point."""

    hook_point: HookPoint
    value: object


@dataclass(frozen=True, slots=True)
class Call:
    """Applies an operation of the shared table."""

    name: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """Applies a module of the model to values, without firing hook points."""

    module_path: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Save:
    """Marks a value to come back."""

    value: object
    name: str


@dataclass(frozen=True, slots=True)
class Log:
    """Sends a message to the user."""

    values: tuple[object, ...]


Operation = Read | Write | Call | ModuleCall | Save | Log


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a trace."""

    id: NodeId
    operation: Operation
    location: Location | None = None

    @property
    def boundary(self) -> Boundary | None:
        """The moment of the forward pass that the node is tied to, if any."""
        if isinstance(self.operation, Read | Write):
            return self.operation.hook_point.boundary
        return None


@dataclass(frozen=True, slots=True)
class Trace:
    """One run of a model with interventions."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row of the batch."""
    nodes: tuple[Node, ...]
    """In the order of definition."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Ends the session."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a segment."""

    kind: Trace | Log | Exit
    location: Location | None = None


def operands(operation: Operation) -> tuple[object, ...]:
    """Gives the arguments of an operation, in which references may be nested."""
    match operation:
        case Read():
            return ()
        case Write(value=value) | Save(value=value):
            return (value,)
        case Log(values=values):
            return values
        case Call(args=args, kwargs=kwargs) | ModuleCall(args=args, kwargs=kwargs):
            return (*args, *kwargs.values())


def references(value: object) -> Iterator[NodeId]:
    """Yields the ids that a value refers to, however deep."""
    match value:
        case Ref(node_id=node_id):
            yield node_id
        case list() | tuple():
            for item in value:
                yield from references(item)
        case dict():
            for item in value.values():
                yield from references(item)
        case slice():
            for part in (value.start, value.stop, value.step):
                yield from references(part)


def resolve(value: Any, value_of: Callable[[NodeId], object]) -> Any:
    """Puts values in the place of references, however deep."""
    match value:
        case Ref(node_id=node_id):
            return value_of(node_id)
        case list():
            return [resolve(item, value_of) for item in value]
        case tuple():
            return tuple(resolve(item, value_of) for item in value)
        case dict():
            return {key: resolve(item, value_of) for key, item in value.items()}
        case slice():
            parts = (value.start, value.stop, value.step)
            return slice(*(resolve(part, value_of) for part in parts))
    return value

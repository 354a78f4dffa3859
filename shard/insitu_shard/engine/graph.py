"""A trace as the engine sees it: nodes that refer to each other by id."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from insitu_shard.engine.training_graph import Training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from insitu_shard.engine.training_graph import Written
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
    invoke: int = 0
    """Number of the invoke whose rows are meant, from 1; 0 for the whole batch."""
    step: int = 0
    """Which pass of a generation, from 0."""

    @property
    def boundary(self) -> Boundary:
        """The moment of the forward pass that the hook point belongs to."""
        is_input = self.side is not Side.OUTPUT
        return Boundary(self.module_path, is_input, self.call_index, self.step)

    def __str__(self) -> str:
        call = f" (call {self.call_index})" if self.call_index else ""
        step = f" at step {self.step}" if self.step else ""
        return f"{self.module_path or 'model'}.{self.side.value}{call}{step}"


class Boundary(NamedTuple):
    """The moment before or after a module's call; `.input` and `.inputs` share one."""

    module_path: str
    is_input: bool
    call_index: int
    step: int = 0
    """Which pass of a generation, from 0."""


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


@dataclass(frozen=True, slots=True)
class Assign:
    """Gives a variable another value."""

    target: NodeId
    value: object


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the forward pass when all nodes defined before have run."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Gives what a call of a module returns, in place of running the module."""

    module_path: str
    call_index: int
    value: object
    step: int = 0


@dataclass(frozen=True, slots=True)
class Keep:
    """Keeps a value beyond the session."""

    value: object
    handle_id: str


@dataclass(frozen=True, slots=True)
class Load:
    """Gives a copy of a value that an earlier session kept."""

    handle_id: str


@dataclass(frozen=True, slots=True)
class Gradient:
    """Gives the gradient of a loss with respect to a value of the same trace."""

    loss: object
    value: object
    gradient: object = None
    """The gradient of the loss itself; None for 1."""
    written: Written = ()


class GeneratedPart(Enum):
    """What of a generation is meant."""

    TOKEN_IDS = "token ids"
    NUM_STEPS = "number of steps"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class Generated:
    """Gives what a trace that generates has made."""

    part: GeneratedPart
    invoke: int = 0
    """Number of the invoke whose rows are meant, from 1; 0 for the whole batch."""


@dataclass(frozen=True, slots=True)
class EndGeneration:
    """Ends generation after the step that runs, where a value is true."""

    when: object
    invoke: int = 0
    """Number of the invoke whose rows are meant, from 1; 0 for the whole batch."""


Operation = (
    Read
    | Write
    | Call
    | ModuleCall
    | Save
    | Log
    | Assign
    | Stop
    | Skip
    | Keep
    | Load
    | Gradient
    | Generated
    | EndGeneration
    | Training
)


class Unset(Enum):
    """Stands for the value of a node that did not run, or that used such a value."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a trace."""

    id: NodeId
    operation: Operation
    location: Location | None = None
    condition: int = 0
    """Number of the trace's condition under which it runs, from 1; 0 for none."""
    step: int = 0
    """Number of the step of a generation that it belongs to, from 1; 0 for none."""
    used: tuple[NodeId, ...] = field(init=False, compare=False)
    """Ids that its arguments refer to."""
    boundary: Boundary | None = field(init=False, compare=False)
    """The moment of the forward pass that the node is tied to, if any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "used", tuple(references(operands(self.operation))))
        object.__setattr__(self, "boundary", _boundary(self.operation))

    @property
    def waits_for_end(self) -> bool:
        """Whether it gives what is known when a generation has ended."""
        operation = self.operation
        return isinstance(operation, Generated) and operation.part is not GeneratedPart.STEP


@dataclass(frozen=True, slots=True)
class Condition:
    """Says when nodes of a trace run."""

    value: object
    is_negated: bool
    parent: int
    """Number of a condition that must hold too, from 1; 0 for none."""


@dataclass(frozen=True, slots=True)
class Invoke:
    """One input of a trace, which owns rows of the batch."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row."""
    token_ids: object = None
    """A reference to token ids that an earlier step gives, in place of rows."""
    args: object = ()
    """Positional arguments, of a module that is no language model."""
    kwargs: object = field(default_factory=dict)
    """Keyword arguments of such a module."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How a trace generates tokens."""

    max_new_tokens: int
    options: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of transformers' `generate`."""
    streams: bool = False
    """Whether tokens are told as they are chosen."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One run of a model with interventions."""

    model: str
    invokes: tuple[Invoke, ...]
    nodes: tuple[Node, ...]
    """In the order of definition."""
    conditions: tuple[Condition, ...] = ()
    seed: int = 0
    """Seed of its random numbers; 0 for the session's."""
    generation: Generation | None = None
    """How it generates; None for one forward pass."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Operations on values, outside any forward pass."""

    nodes: tuple[Node, ...]
    model: str = ""
    """Name of the model whose modules they call; empty where they call none."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Runs steps once an item."""

    items: object
    item_node_id: NodeId
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """Runs one of two lists of steps."""

    condition: object
    steps: tuple[Step, ...]
    else_steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Exit:
    """Ends the session, or the loop whose item has the id."""

    loop: NodeId = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a segment."""

    kind: Trace | Compute | Loop | Branch | Log | Exit
    location: Location | None = None
    trace_number: int = 0
    """Number of the trace in the session, from 1; 0 if it is none."""


def _boundary(operation: Operation) -> Boundary | None:
    match operation:
        case Read(hook_point=point) | Write(hook_point=point):
            return point.boundary
        case Skip(module_path=path, call_index=call, step=step):
            return Boundary(path, True, call, step)
    return None


def operands(operation: Operation) -> tuple[object, ...]:
    """Gives the arguments of an operation, in which references may be nested."""
    match operation:
        case Read() | Stop() | Load() | Generated():
            return ()
        case EndGeneration(when=when):
            return (when,)
        case Write(value=value) | Save(value=value) | Skip(value=value) | Keep(value=value):
            return (value,)
        case Assign(target=target, value=value):
            return (Ref(target), value)
        case Log(values=values):
            return values
        case Gradient(loss=loss, value=value, gradient=gradient, written=written):
            return (loss, value, gradient, *written)
        case Call(args=args, kwargs=kwargs) | ModuleCall(args=args, kwargs=kwargs):
            return (*args, *kwargs.values())
    return operation.operands


def references(value: object) -> Iterator[NodeId]:
    """Yields the ids that a value refers to, however deep."""
    found: list[NodeId] = []
    _collect(value, found)
    return iter(found)


def _collect(value: object, found: list[NodeId]) -> None:
    match value:
        case Ref(node_id=node_id):
            found.append(node_id)
        case list() | tuple():
            for item in value:
                _collect(item, found)
        case dict():
            for item in value.values():
                _collect(item, found)
        case slice():
            for part in (value.start, value.stop, value.step):
                _collect(part, found)


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

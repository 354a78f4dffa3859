"""Where values that are not there yet come from, and what to say when they are touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from insitu._source import assigned_name, user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from insitu._gradients import GradientRead
    from insitu._recorder import Scope, SessionRecorder
    from insitu_wire.errors import Error, Location


@dataclass(frozen=True, slots=True)
class Moment:
    """When a value is there, in the forward pass of its trace."""

    block_number: int
    reached_at: int = 0
    """Place in the pass from which on the value exists; 0 if it needs nothing of the pass."""
    waits_for: str = ""
    """The read that it waits for, with its line."""
    written_by: int = 0
    """Place in the pass by which a write into the value must be done, for it is the model's own;
    0 if it is not."""


@dataclass(slots=True)
class Origin:
    """Where a proxy comes from.

    A proxy is either the value of a node, or an item of a structure that is; the latter gets a node
    of its own only when it is used.
    """

    recorder: SessionRecorder
    location: Location
    description: str
    node_id: int = 0
    parent: Origin | None = None
    key: object = None
    moment: Moment = Moment(0)
    scope: Scope = ()
    gradient: GradientRead | None = None
    """What was read of a backward pass, if the value shares memory with it."""

    def id(self) -> int:
        """Gives the id of the node that makes the value."""
        if self.parent is not None and not self._is_set:
            parent = NodeReference(self.parent.id())
            self.scope = self.recorder.scope
            self.node_id = self.recorder.block.call(
                "operator.getitem", (parent, self.key), {}, self.location
            )
        return self.node_id

    @property
    def _is_set(self) -> bool:
        """Whether the node surely ran, here: an item may first have been used in a branch."""
        return bool(self.node_id) and self.scope == self.recorder.scope[: len(self.scope)]

    def item(self, key: object) -> Origin:
        """Gives the origin of an item."""
        return Origin(
            self.recorder,
            self.location,
            f"{self.description}[{key!r}]",
            parent=self,
            key=key,
            moment=self.moment,
        )

    def __str__(self) -> str:
        name = assigned_name(self.location)
        return f"{name!r} ({self.description})" if name else self.description


class Container:
    """A list or dict that is built while the session runs."""

    _origin: Origin
    _is_saved = False
    _is_there = False

    def _fill(self, value: Any) -> None:
        """Makes it what it was when the session ended."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class NodeReference:
    """Stands for the value of a node among the arguments of another."""

    node_id: int


def latest(origins: Iterable[Origin], block_number: int) -> Moment:
    """Gives when the last of some values is there, in a trace."""
    moments = [o.moment for o in origins if o.moment.block_number == block_number]
    return max(moments, key=lambda moment: moment.reached_at, default=Moment(block_number))


def check_in_time(needed: Moment, written_by: int, location: Location) -> None:
    """Refuses a write into the pass of a value that the same pass makes only later.

    Args:
        needed: when what the write needs is there.
        written_by: place in the pass by which the write must be done; 0 if it may be done any time.
        location: the line of the write.

    Raises:
        InvalidTraceError: CYCLIC_TRACE.
    """
    if written_by and needed.reached_at > written_by:
        raise error(
            Reason.CYCLIC_TRACE,
            f"this write needs {needed.waits_for}, which the same forward pass reaches only later; "
            "take the value from an earlier module, or write in a later trace (a .clone() of what "
            "was read may be written to at any time)",
            location=location,
            waitsFor=needed.waits_for,
        )


def missing(origin: Origin) -> str:
    """Says why a value is not there, for its repr."""
    return f"{origin} {_problem(origin)[0]}"


def not_here(origin: Origin) -> Error:
    """Makes the error for who needs a value's elements, with the cure."""
    return error(
        Reason.VALUE_NOT_AVAILABLE,
        f"{origin} {'; '.join(_problem(origin))}",
        location=user_location(),
        value=assigned_name(origin.location) or origin.description,
    )


def _problem(origin: Origin) -> tuple[str, str]:
    """Tells why a value has no elements, and the cure."""
    match origin.recorder.state, _is_saved(origin):
        case "recorded", _:
            return (
                "has no elements, for its session was recorded without running",
                "open it without run=False to run it, or save it to a file for `insitu run`",
            )
        case "submitted", True:
            return (
                "is not here before its session has ended",
                "call .wait() on the session's submission first",
            )
        case "done", True:
            return (
                "has not come back, for what makes it did not run",
                "a condition did not hold, a stop or exit came before it, or the session failed",
            )
        case "submitted" | "done", False:
            return (
                "was not saved: call .save() on it inside the session",
                "what is not saved stays where the model runs",
            )
    return (
        "has no elements before the session has run",
        "call .save() on it and use it after the block, or use operations that run with the "
        "session, such as torch.where",
    )


def _is_saved(origin: Origin | None) -> bool:
    """Tells whether a value, or what it is an item of, is to come back and has not yet."""
    if origin is None:
        return False
    saved = origin.recorder.saved.values()
    is_it = any(getattr(value, "_origin", None) is origin for value in saved)
    return is_it or _is_saved(origin.parent)

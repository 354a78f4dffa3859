"""Where values that are not there yet come from, and what to say when they are touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu._source import assigned_name, user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu._recorder import SessionRecorder
    from insitu_wire.errors import Error, Location


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

    def id(self) -> int:
        """Gives the id of the node that makes the value."""
        if not self.node_id:
            assert self.parent is not None
            trace = self.recorder.last_trace
            assert trace is not None
            parent = NodeReference(self.parent.id())
            self.node_id = trace.call("operator.getitem", (parent, self.key), {}, self.location)
        return self.node_id

    def item(self, key: object) -> Origin:
        """Gives the origin of an item."""
        return Origin(
            self.recorder, self.location, f"{self.description}[{key!r}]", parent=self, key=key
        )

    def __str__(self) -> str:
        name = assigned_name(self.location)
        return f"{name!r} ({self.description})" if name else self.description


@dataclass(frozen=True, slots=True)
class NodeReference:
    """Stands for the value of a node among the arguments of another."""

    node_id: int


def missing(origin: Origin) -> str:
    """Says why a value is not there, for its repr."""
    if origin.recorder.state == "done":
        return f"{origin} was not saved: call .save() on it inside the session"
    return f"{origin} has no elements before the session has run"


def not_here(origin: Origin) -> Error:
    """Makes the error for who needs a value's elements, with the cure."""
    if origin.recorder.state == "done":
        message = (
            f"{origin} was not saved, so it stayed where the model runs; call .save() on it inside "
            "the session, and use it after the block"
        )
    else:
        message = (
            f"{origin} has no elements before the session has run; call .save() on it and use it "
            "after the block, or use operations that run with the session, such as torch.where"
        )
    return error(
        Reason.VALUE_NOT_AVAILABLE,
        message,
        location=user_location(),
        value=assigned_name(origin.location) or origin.description,
    )

"""Warns of code that does nothing, before a session is sent."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from insitu._source import assigned_name
from insitu_wire.errors import Location
from insitu_wire.operations import is_in_place
from insitu_wire.steps import all_steps, references_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Session


class UnusedValueWarning(UserWarning):
    """A value of a session is neither saved nor used, so that computing it changes nothing."""


def warn_of_unused(session: Session) -> None:
    """Warns at each line that does nothing but make values which are neither saved nor used."""
    used = {node_id for step in all_steps(session.steps) for node_id in references_of(step)}
    useful = {
        node.location
        for node in _nodes(session)
        if node.id in used or not _only_makes_a_value(node)
    }
    idle = dict.fromkeys(node.location for node in _nodes(session) if node.location not in useful)
    for index in filter(None, idle):
        at = session.locations[index - 1]
        _warn(Location(at.file, at.line, at.source))


def _nodes(session: Session) -> Iterator[Node]:
    for step in all_steps(session.steps):
        yield from step.trace.nodes
        yield from step.compute.nodes


def _only_makes_a_value(node: Node) -> bool:
    match node.WhichOneof("operation"):
        case "call":
            return not is_in_place(node.call.name)
        case "read" | "module_call" | "load" | "gradient" | "parameter" | "read_gradient":
            return True
    return False


def _warn(at: Location) -> None:
    name = assigned_name(at)
    what = f"{name!r} is" if name else "this value is"
    warnings.warn_explicit(
        f"{what} neither saved nor used: {at.source!r} only makes a value. Call .save() on it to "
        "have it; to change what the model computes, write to its place, as in "
        "`module.output[...] = value`",
        UnusedValueWarning,
        at.file,
        at.line,
    )

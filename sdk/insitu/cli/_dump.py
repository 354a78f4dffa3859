"""Draws a session as text: protobuf's, under the lines of code that recorded it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from google.protobuf import text_format

from insitu_proto.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Session, Step

_CHILDREN = ("nodes", "steps", "else_steps")
# The shape and element type say enough.
_ELEMENTS = re.compile(r'\bdata: "(?:[^"\\]|\\.)*"')


def dump(session: Session) -> Iterator[str]:
    """Yields the lines of a session's text, the user's tensors first.

    A line of code stands once above what it recorded.
    """
    for index, tensor in enumerate(session.tensors):
        description = Tensor(dtype=tensor.dtype, shape=tensor.shape)
        yield f"tensor {index} {{ {_text(description)} data: ... }}"
    shown = ""
    for step in session.steps:
        for line in _draw_step(session, step, ""):
            is_code = line.lstrip().startswith("#")
            if not is_code or line != shown:
                yield line
            shown = line if is_code else shown


def _draw_step(session: Session, step: Step, indent: str) -> Iterator[str]:
    """Draws a step, and the nodes and steps inside it deeper."""
    yield from _draw_line(session, step.location, indent)
    kind = step.WhichOneof("kind")
    message = getattr(step, kind) if kind else step
    yield f"{indent}{kind} {{ {_text(message)} }}"
    for node in step.trace.nodes:
        yield from _draw_node(session, node, indent + "  ")
    for inner in (step.loop.steps, step.branch.steps, step.branch.else_steps):
        for child in inner:
            yield from _draw_step(session, child, indent + "  ")


def _draw_node(session: Session, node: Node, indent: str) -> Iterator[str]:
    yield from _draw_line(session, node.location, indent)
    operation = node.WhichOneof("operation")
    message = getattr(node, operation) if operation else node
    yield f"{indent}%{node.id} = {operation} {{ {_text(message)} }}"


def _draw_line(session: Session, location: int, indent: str) -> Iterator[str]:
    """Draws the user's line that a step or node comes from, where it is known."""
    if location:
        where = session.locations[location - 1]
        yield f"{indent}# {where.file}:{where.line}  {where.source}"


def _text(message: Message) -> str:
    shallow = type(message)()
    shallow.CopyFrom(message)
    for field in _CHILDREN:
        if field in message.DESCRIPTOR.fields_by_name:
            shallow.ClearField(field)
    text = text_format.MessageToString(
        shallow, as_utf8=True, as_one_line=True, use_short_repeated_primitives=True
    )
    return _ELEMENTS.sub("data: ...", text)

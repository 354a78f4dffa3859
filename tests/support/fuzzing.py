"""Makes protobuf messages that nobody meant: arbitrary ones, and valid ones that were changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

from insitu_scheduler.validation import validate
from insitu_wire.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from random import Random

    from google.protobuf.message import Message

    from insitu_proto.v1.session_pb2 import Session
    from insitu_scheduler.models import KnownModel
    from insitu_shard.engine.module import LoadedModule

_NUMBERS = (0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TEXTS = ("", "a", "model.layers.0", "lm_head", "tiny", "../..", "\x00", "é", "x" * 5000)
_FLOATS = (0.0, -1.5, 1e308, float("inf"), float("nan"))
_MAX_DEPTH = 8
_MAX_PARTS = 400
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: 32,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_INT64: 64,
    FieldDescriptor.CPPTYPE_UINT64: 64,
}
_SIGNED = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)


def arbitrary(message: Message, random: Random, depth: int = 0) -> Message:
    """Fills a message with fields that fit its type, and nothing else."""
    for field in message.DESCRIPTOR.fields:
        if random.random() < 0.4 and not _is_map(field):
            for _ in range(random.choice((1, 1, 2, 5)) if field.is_repeated else 1):
                _add(message, field, random, depth)
    return message


def mutated(valid: Message, random: Random) -> Message:
    """Changes a few things of a valid message."""
    message = type(valid)()
    message.CopyFrom(valid)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        _change(random.choice(list(_parts(message))), random)
    return message


def garbled(message: bytes, random: Random) -> bytes:
    """Changes some bytes of an encoded message, or cuts it, or repeats a piece."""
    data = bytearray(message or b"\x0a\x00")
    for _ in range(random.choice((1, 2, 8))):
        at = random.randrange(len(data)) if data else 0
        match random.randrange(4):
            case 0 if data:
                data[at] = random.randrange(256)
            case 1:
                del data[at : at + random.randrange(1, 9)]
            case 2:
                data[at:at] = data[at : at + 64] * random.choice((1, 50))
            case _:
                data[at:at] = bytes(random.randrange(256) for _ in range(3))
    return bytes(data)


def nested(depth: int) -> bytes:
    """Encodes a submission whose loops are nested in each other."""
    step = b""
    for _ in range(depth):
        inner = b"\x1a" + _length(step) + step  # Loop.steps
        step = b"\x2a" + _length(inner) + inner  # Step.loop
    session = b"\x0a" + _length(step) + step
    return b"\x12" + _length(session) + session


def run_in_engine(session: Session, model: LoadedModule, known: Mapping[str, KnownModel]) -> bool:
    """Runs a session as a shard would, if the scheduler lets it in; tells whether it does.

    Raises whatever is not an error of the table.
    """
    from insitu_proto.v1.shard_service_pb2 import Segment
    from insitu_shard.engine import SegmentRun
    from insitu_shard.upload_cache import session_tensors

    try:
        validate(session, known)
    except Error:
        return False
    segment = Segment(
        steps=session.steps,
        locations=session.locations,
        first_trace_number=1,
        seed=session.seed,
        exact=session.exact,
        padding=session.padding,
        tensors=session.tensors,
    )
    try:
        tensors = session_tensors(segment.tensors, {}, device=model.device)
        run = SegmentRun({"tiny": model}, segment, {}, tensors)
        for _ in run.run():
            pass
    except Error:
        pass
    return True


def _length(data: bytes) -> bytes:
    number, encoded = len(data), bytearray()
    while number >= 128:
        encoded.append(number % 128 + 128)
        number //= 128
    return bytes([*encoded, number])


def _parts(message: Message) -> Iterator[Message]:
    """Yields a message and those inside it."""
    pending, count = [message], 0
    while pending and count < _MAX_PARTS:
        part = pending.pop(0)
        count += 1
        yield part
        for field, value in part.ListFields():
            if field.message_type is None or _is_map(field):
                continue
            pending += list(value) if field.is_repeated else [value]


def _change(message: Message, random: Random) -> None:
    present = [field for field, _ in message.ListFields() if not _is_map(field)]
    fields = present if present and random.random() < 0.8 else list(message.DESCRIPTOR.fields)
    fields = [field for field in fields if not _is_map(field)]
    if not fields:
        return
    field = random.choice(fields)
    values = getattr(message, field.name) if field.is_repeated else None
    match random.randrange(4):
        case 0:
            message.ClearField(field.name)
        case 1 if values:
            del values[random.randrange(len(values))]
        case 2 if values:
            values.extend([random.choice(list(values))] * random.choice((1, 3)))
        case _:
            _add(message, field, random, depth=_MAX_DEPTH - 2)


def _add(message: Any, field: FieldDescriptor, random: Random, depth: int) -> None:
    if field.message_type is not None:
        if depth < _MAX_DEPTH:
            holder = getattr(message, field.name)
            inner = holder.add() if field.is_repeated else holder
            inner.SetInParent()
            arbitrary(inner, random, depth + 1)
        return
    value = _scalar(field, random)
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def _scalar(field: FieldDescriptor, random: Random) -> object:
    kind = field.cpp_type
    if kind in _INTEGERS:
        number = random.choice(_NUMBERS) % 2 ** (_INTEGERS[kind] - (kind in _SIGNED))
        return -number if kind in _SIGNED and random.random() < 0.2 else number
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice([value.number for value in field.enum_type.values])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return random.choice(_FLOATS)
    text = random.choice(_TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry

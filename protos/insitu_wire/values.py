"""Encodes Python values as `insitu.v1.Value` and back; torch's own types are left to the caller."""

from __future__ import annotations

from types import EllipsisType
from typing import TYPE_CHECKING

from insitu_proto.v1 import value_pb2
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from insitu_proto.v1 import tensor_pb2

_MAX_INT = 2**63 - 1


def encode(  # noqa: C901 - one case a kind
    value: object, encode_leaf: Callable[[object], value_pb2.Value | None]
) -> value_pb2.Value:
    """Encodes a value.

    Args:
        value: the value.
        encode_leaf: encodes what this module does not know (tensors, dtypes, references), or gives
            None for what it does not know either.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for a type that has no encoding.
    """
    if (leaf := encode_leaf(value)) is not None:
        return leaf
    match value:
        case None:
            return value_pb2.Value(none=value_pb2.NoneValue())
        case bool():
            return value_pb2.Value(bool_value=value)
        case int() if abs(value) <= _MAX_INT:
            return value_pb2.Value(int_value=value)
        case float():
            return value_pb2.Value(float_value=value)
        case str():
            return value_pb2.Value(str_value=value)
        case EllipsisType():
            return value_pb2.Value(ellipsis=value_pb2.EllipsisValue())
        case slice():
            parts = {
                name: encode(part, encode_leaf)
                for name in ("start", "stop", "step")
                if (part := getattr(value, name)) is not None
            }
            return value_pb2.Value(slice=value_pb2.SliceValue(**parts))
        case list():
            return value_pb2.Value(list=_encode_items(value, encode_leaf))
        case tuple():
            return value_pb2.Value(tuple=_encode_items(value, encode_leaf))
        case dict():
            items = [
                value_pb2.DictItem(key=encode(key, encode_leaf), value=encode(item, encode_leaf))
                for key, item in value.items()
            ]
            return value_pb2.Value(dict=value_pb2.DictValue(items=items))
    raise error(
        Reason.MALFORMED_SESSION,
        f"a {type(value).__name__} can not be part of a session: {value!r:.80}; use tensors, "
        "numbers (at most 64 bits), strings, None, slices, and lists, tuples and dicts of these",
        type=type(value).__name__,
    )


def _encode_items(
    items: list[object] | tuple[object, ...],
    encode_leaf: Callable[[object], value_pb2.Value | None],
) -> value_pb2.ListValue:
    return value_pb2.ListValue(items=[encode(item, encode_leaf) for item in items])


def decode(  # noqa: C901 - one case a kind
    value: value_pb2.Value, decode_leaf: Callable[[value_pb2.Value], object]
) -> object:
    """Decodes a value; `decode_leaf` gets tensors, dtypes, devices and references.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for a value with no kind.
    """
    match value.WhichOneof("kind"):
        case "none":
            return None
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "float_value":
            return value.float_value
        case "str_value":
            return value.str_value
        case "ellipsis":
            return ...
        case "slice":
            parts = value.slice
            return slice(
                *(
                    decode(getattr(parts, name), decode_leaf) if parts.HasField(name) else None
                    for name in ("start", "stop", "step")
                )
            )
        case "list":
            return [decode(item, decode_leaf) for item in value.list.items]
        case "tuple":
            return tuple(decode(item, decode_leaf) for item in value.tuple.items)
        case "dict":
            pairs = [
                (decode(item.key, decode_leaf), decode(item.value, decode_leaf))
                for item in value.dict.items
            ]
            try:
                return dict(pairs)
            except TypeError as exception:
                raise error(
                    Reason.MALFORMED_SESSION, f"a key of a dict can not be one: {exception}"
                ) from exception
        case "tensor" | "tensor_index" | "dtype" | "device" | "reference":
            return decode_leaf(value)
    raise error(
        Reason.MALFORMED_SESSION,
        "a value of the session has no kind that this version knows; upgrade the older of the two",
    )


def walk(value: value_pb2.Value) -> Iterator[value_pb2.Value]:
    """Yields a value and all values inside it."""
    yield value
    match value.WhichOneof("kind"):
        case "slice":
            for name in ("start", "stop", "step"):
                if value.slice.HasField(name):
                    yield from walk(getattr(value.slice, name))
        case "list" | "tuple" as kind:
            for item in getattr(value, kind).items:
                yield from walk(item)
        case "dict":
            for pair in value.dict.items:
                yield from walk(pair.key)
                yield from walk(pair.value)


def tensors(value: value_pb2.Value) -> Iterator[tensor_pb2.Tensor]:
    """Yields the tensors inside a value."""
    return (part.tensor for part in walk(value) if part.WhichOneof("kind") == "tensor")

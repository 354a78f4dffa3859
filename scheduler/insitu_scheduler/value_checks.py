"""Checks the values of a session: tensors, containers and references."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from insitu_scheduler.refusals import check_limit, malformed, unsupported
from insitu_wire.content_hash import is_content_hash
from insitu_wire.dtypes import DTYPE_NAMES, num_bytes
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MAX_UPLOAD_BYTES
from insitu_wire.values import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
    from insitu_proto.v1.value_pb2 import DictValue, Value

MAX_RANK = 16
MAX_SIZES = 2**48
MAX_DEPTH = 32
MAX_VALUES = 1_000_000
_KEY_KINDS = ("none", "bool_value", "int_value", "float_value", "str_value", "tuple")


class ValueChecker:
    """Checks all values of one session, and counts them."""

    def __init__(self, check_reference: Callable[[int], None], *, num_tensors: int) -> None:
        """Makes the checker.

        Args:
            check_reference: raises if the value of a node can not be used.
            num_tensors: length of the session's list of tensors.
        """
        self._check_reference = check_reference
        self._num_tensors = num_tensors
        self._num_values = 0

    def check(self, value: Value, owner: str, *, depth: int = 1) -> None:
        """Checks a value and all inside it; `owner` is named in errors.

        Raises:
            Error: what is wrong with it.
        """
        self._count(owner, depth)
        match value.WhichOneof("kind"):
            case None:
                raise unsupported(f"{owner} has a value of a kind that it does not know")
            case "reference":
                self._check_reference(value.reference.node_id)
            case "tensor":
                _check_elements(value.tensor, owner)
            case "tensor_index":
                self._check_tensor_index(value.tensor_index, owner)
            case "dtype":
                _check_dtype(value.dtype, owner)
            case "dict":
                _check_keys(value.dict, owner)
        for part in _parts(value):
            self.check(part, owner, depth=depth + 1)

    def _check_tensor_index(self, index: int, owner: str) -> None:
        if index >= self._num_tensors:
            raise malformed(
                f"{owner} refers to tensor {index}, and the session has {self._num_tensors}; "
                "indices start at 0",
                tensorIndex=index,
            )

    def _count(self, owner: str, depth: int) -> None:
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise malformed(f"{owner} has values nested deeper than {MAX_DEPTH}; nest them less")
        check_limit("values", self._num_values, MAX_VALUES)


def _parts(value: Value) -> Iterable[Value]:
    match value.WhichOneof("kind"):
        case "list":
            return value.list.items
        case "tuple":
            return value.tuple.items
        case "dict":
            return [part for item in value.dict.items for part in (item.key, item.value)]
        case "slice":
            parts = value.slice
            return [getattr(parts, n) for n in ("start", "stop", "step") if parts.HasField(n)]
    return ()


def check_brought_tensor(tensor: Tensor, owner: str) -> None:
    """Checks a tensor of a session's list: with its elements, or by the hash of an upload.

    Raises:
        Error: what is wrong with it.
    """
    if tensor.WhichOneof("content") == "content_hash":
        check_upload(tensor, owner)
    else:
        _check_elements(tensor, owner)


def check_upload(tensor: Tensor, owner: str = "the upload") -> None:
    """Checks a tensor whose elements are uploaded.

    Raises:
        Error: what is wrong with it.
    """
    _check_shape(tensor, owner)
    if not is_content_hash(tensor.content_hash):
        raise malformed(
            f"{owner} has a tensor with content hash {tensor.content_hash[:80]!r}; it must be 64 "
            "lowercase hexadecimal digits"
        )
    if num_bytes(tensor) > MAX_UPLOAD_BYTES:
        raise error(
            Reason.REQUEST_TOO_LARGE,
            f"{owner} has a tensor of {num_bytes(tensor):,} bytes and the server takes at most "
            f"{MAX_UPLOAD_BYTES:,}; bring it in parts, or in a smaller element type",
            numBytes=num_bytes(tensor),
            maxBytes=MAX_UPLOAD_BYTES,
        )


def _check_shape(tensor: Tensor, owner: str) -> None:
    _check_dtype(tensor.dtype, owner)
    shape = list(tensor.shape)
    if len(shape) > MAX_RANK:
        raise malformed(f"{owner} has a tensor of {len(shape)} dimensions; at most {MAX_RANK}")
    if any(size < 0 for size in shape):
        raise malformed(f"{owner} has a tensor of shape {shape}; sizes are 0 or more")
    # Also of a tensor without elements: torch multiplies its other sizes.
    if math.prod(max(size, 1) for size in shape) > MAX_SIZES:
        raise malformed(
            f"{owner} has a tensor of shape {shape}; its sizes, without those that are 0, must "
            f"have a product of at most {MAX_SIZES:,}"
        )


def _check_elements(tensor: Tensor, owner: str) -> None:
    _check_shape(tensor, owner)
    shape = list(tensor.shape)
    if tensor.WhichOneof("content") == "content_hash":
        raise malformed(
            f"{owner} has a tensor by content hash; put it into the session's list of tensors, and "
            "refer to it by index"
        )
    if tensor.WhichOneof("content") != "data":
        raise malformed(f"{owner} has a tensor without elements; send them as data")
    if len(tensor.data) != num_bytes(tensor):
        raise malformed(
            f"{owner} has a tensor of shape {shape} and type {DTYPE_NAMES[tensor.dtype]} with "
            f"{len(tensor.data)} bytes of elements; it needs {num_bytes(tensor)}",
            numBytes=len(tensor.data),
        )


def _check_dtype(dtype: Dtype.ValueType, owner: str) -> None:
    if dtype not in DTYPE_NAMES:
        raise malformed(
            f"{owner} has the element type number {dtype}; use one of "
            f"{', '.join(DTYPE_NAMES.values())}",
            dtype=dtype,
        )


def _check_keys(value: DictValue, owner: str) -> None:
    seen: set[bytes] = set()
    for item in value.items:
        for part in walk(item.key):
            if (kind := part.WhichOneof("kind")) not in _KEY_KINDS:
                raise malformed(
                    f"{owner} has a dict with a {kind} as key; keys are None, bools, numbers, "
                    "strings and tuples of these"
                )
        encoded = item.key.SerializeToString(deterministic=True)
        if encoded in seen:
            raise malformed(f"{owner} has a dict with one key twice; keys are unique")
        seen.add(encoded)

"""Names and sizes of the element types, for programs with and without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from insitu_proto.v1.tensor_pb2 import Dtype

if TYPE_CHECKING:
    from insitu_proto.v1.tensor_pb2 import Tensor

DTYPE_NAMES: dict[Dtype.ValueType, str] = {
    number: name.removeprefix("DTYPE_").lower() for name, number in Dtype.items() if number
}
"""The names that torch uses, such as "float32"."""

DTYPES_BY_NAME: dict[str, Dtype.ValueType] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_BITS = {"bool": 8, "bfloat16": 16, "complex64": 64, "complex128": 128}


def itemsize(dtype: Dtype.ValueType) -> int:
    """Gives the bytes of one element."""
    name = DTYPE_NAMES[dtype]
    bits = _BITS.get(name) or int("".join(filter(str.isdigit, name)))
    return bits // 8


def num_bytes(tensor: Tensor) -> int:
    """Gives the bytes that a tensor's elements take."""
    return math.prod(tensor.shape) * itemsize(tensor.dtype)

"""The name of a tensor's content: by it a tensor is uploaded once, and found again."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from insitu_wire.dtypes import DTYPE_NAMES
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from hashlib import _Hash

    from insitu_proto.v1.tensor_pb2 import Tensor
    from insitu_wire.errors import Error

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


def hasher(tensor: Tensor) -> _Hash:
    """Gives SHA-256 over a tensor's element type and shape; its elements are to be added."""
    return hashlib.sha256(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())


def content_hash(tensor: Tensor, data: bytes | bytearray | memoryview) -> str:
    """Gives the content hash of a tensor with these elements."""
    digest = hasher(tensor)
    digest.update(data)
    return digest.hexdigest()


def is_content_hash(text: str) -> bool:
    """Whether a text can be a content hash."""
    return _CONTENT_HASH.fullmatch(text) is not None


def wrong_content(tensor: Tensor, got: str) -> Error:
    """Makes the error for elements that are not those that a tensor's hash names."""
    return error(
        Reason.CHECKSUM_MISMATCH,
        f"the tensor {tensor.content_hash} of shape {list(tensor.shape)} arrived with {got}; it "
        "was damaged on the way, or changed while it was sent: run the session again",
        contentHash=tensor.content_hash,
    )

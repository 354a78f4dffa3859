"""Encodes values that hold torch's tensors. The only module here that knows torch: see ADR 0002."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_proto.v1 import tensor_pb2, value_pb2
from insitu_wire import values
from insitu_wire.dtypes import DTYPE_NAMES, DTYPES_BY_NAME, num_bytes
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TO_PB: dict[torch.dtype, tensor_pb2.Dtype.ValueType] = {
    getattr(torch, name): number for name, number in DTYPES_BY_NAME.items()
}


def dtype_to_pb(dtype: torch.dtype) -> tensor_pb2.Dtype.ValueType:
    """Encodes an element type.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for one that the contract lacks.
    """
    try:
        return _TO_PB[dtype]
    except KeyError:
        allowed = ", ".join(DTYPES_BY_NAME)
        raise error(
            Reason.MALFORMED_SESSION,
            f"{dtype} can not be part of a session; convert it to one of {allowed}",
            dtype=dtype,
        ) from None


def dtype_from_pb(dtype: tensor_pb2.Dtype.ValueType) -> torch.dtype:
    """Decodes an element type."""
    return getattr(torch, DTYPE_NAMES[dtype])  # type: ignore[no-any-return] # a closed table


def tensor_data(tensor: torch.Tensor) -> memoryview:
    """Gives a tensor's elements in row-major order, without a copy where they lie so on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def tensor_spec(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """Describes a tensor without its elements.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for an element type that the contract lacks.
    """
    return tensor_pb2.Tensor(dtype=dtype_to_pb(tensor.dtype), shape=list(tensor.shape))


def tensor_from_data(spec: tensor_pb2.Tensor, data: bytearray | memoryview) -> torch.Tensor:
    """Makes a tensor over writable bytes, sharing them."""
    dtype = dtype_from_pb(spec.dtype)
    if not data:
        return torch.empty(tuple(spec.shape), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(tuple(spec.shape))


def encode(
    value: object,
    reference: Callable[[object], int | None] = lambda _: None,
    bring: Callable[[torch.Tensor], int] | None = None,
) -> value_pb2.Value:
    """Encodes a value.

    Args:
        value: the value.
        reference: gives the node id of what is recorded elsewhere, or None.
        bring: gives a tensor's place in the session's list; without it, tensors' elements are
            inside the value.
    """

    def leaf(part: object) -> value_pb2.Value | None:
        if (node_id := reference(part)) is not None:
            return value_pb2.Value(reference=value_pb2.Reference(node_id=node_id))
        if isinstance(part, torch.Tensor):
            return value_pb2.Value(tensor_index=bring(part)) if bring else _encode_tensor(part)
        return _encode_torch_scalar(part)

    return values.encode(value, leaf)


def _encode_tensor(tensor: torch.Tensor) -> value_pb2.Value:
    spec = tensor_spec(tensor)
    spec.data = bytes(tensor_data(tensor))
    return value_pb2.Value(tensor=spec)


def check_saved(value: object) -> None:
    """Refuses what `encode_saved` would refuse, without its work for a tensor alone.

    Raises:
        InvalidTraceError: MALFORMED_SESSION.
    """
    if isinstance(value, torch.Tensor):
        dtype_to_pb(value.dtype)
    else:
        encode_saved(value)


def encode_saved(value: object) -> tuple[value_pb2.Value, list[torch.Tensor]]:
    """Encodes a saved value; its tensors' elements are to follow, in order, as data."""
    tensors: list[torch.Tensor] = []
    offset = 0

    def leaf(part: object) -> value_pb2.Value | None:
        nonlocal offset
        if isinstance(part, torch.Tensor):
            spec = tensor_spec(part)
            spec.data_offset = offset
            offset += num_bytes(spec)
            tensors.append(part)
            return value_pb2.Value(tensor=spec)
        return _encode_torch_scalar(part)

    return values.encode(value, leaf), tensors


def _encode_torch_scalar(part: object) -> value_pb2.Value | None:
    if isinstance(part, torch.dtype):
        return value_pb2.Value(dtype=dtype_to_pb(part))
    if isinstance(part, torch.device):
        return value_pb2.Value(device=str(part))
    return None


def decode(
    value: value_pb2.Value,
    *,
    resolve: Callable[[int], object] | None = None,
    tensors: Sequence[torch.Tensor] = (),
    data: bytearray | None = None,
    device: torch.device | None = None,
) -> object:
    """Decodes a value.

    Args:
        value: the encoded value.
        resolve: gives the value of a node by its id.
        tensors: the session's, which values refer to by index.
        data: elements of tensors that lie outside the value; the tensors share it.
        device: where tensors go, and what every device means; None for the CPU.
    """

    def leaf(part: value_pb2.Value) -> object:
        match part.WhichOneof("kind"):
            case "dtype":
                return dtype_from_pb(part.dtype)
            case "device":
                return device or torch.device("cpu")
            case "reference" if resolve is not None:
                return resolve(part.reference.node_id)
            case "tensor_index" if part.tensor_index < len(tensors):
                return tensors[part.tensor_index]
            case "tensor":
                return _decode_tensor(part.tensor, data).to(device or "cpu")
        raise error(Reason.MALFORMED_SESSION, f"a {part.WhichOneof('kind')} has no place here")

    return values.decode(value, leaf)


def _decode_tensor(spec: tensor_pb2.Tensor, data: bytearray | None) -> torch.Tensor:
    if spec.WhichOneof("content") == "data_offset" and data is not None:
        start = spec.data_offset
        return tensor_from_data(spec, memoryview(data)[start : start + num_bytes(spec)])
    return tensor_from_data(spec, bytearray(spec.data))

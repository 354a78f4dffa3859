"""The user's own tensors that a session uses: each once, however often it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_wire import torch_codec
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MIN_UPLOAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Protocol

    from insitu_proto.v1 import session_pb2
    from insitu_proto.v1.tensor_pb2 import Tensor

    class TensorList(Protocol):
        """A message's repeated field of tensors."""

        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[Tensor]: ...
        def append(self, value: Tensor, /) -> None: ...


class BroughtTensors:
    """Puts tensors into a session's list.

    A small one is copied when it is used. A large one is referred to until the session runs, and
    must not change before; views of one memory that look alike are one tensor.
    """

    def __init__(self, specs: TensorList) -> None:
        """Starts an empty list.

        Args:
            specs: the session's list; large tensors have no content in it yet.
        """
        self._specs = specs
        self._indices: dict[object, int] = {}
        self._large: dict[int, tuple[torch.Tensor, int]] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Gives a tensor's place in the list."""
        if tensor.is_meta:
            raise error(
                Reason.VALUE_NOT_AVAILABLE,
                f"a tensor of shape {list(tensor.shape)} is on the meta device and has no elements "
                "to bring; load it first, for example with .to_empty and load_state_dict",
            )
        if tensor.layout is not torch.strided:
            raise error(
                Reason.MALFORMED_SESSION,
                f"a tensor of shape {list(tensor.shape)} has layout {tensor.layout}; sessions take "
                "dense ones: use .to_dense()",
            )
        tensor = tensor.detach()
        return (
            self._add_small(tensor) if tensor.nbytes < MIN_UPLOAD_BYTES else self._add_large(tensor)
        )

    def adopt(self, other: BroughtTensors) -> list[int]:
        """Takes in the tensors of another list; gives their places in this one.

        Raises:
            InvalidTraceError: MALFORMED_SESSION if one was written to since it was used.
        """
        large = other.large()
        return [
            self._add_large(large[index])
            if index in large
            else self._place(spec.SerializeToString(), spec)
            for index, spec in enumerate(other._specs)
        ]

    def large(self) -> Mapping[int, torch.Tensor]:
        """Gives the tensors whose elements are not in the session, by their place in the list.

        Raises:
            InvalidTraceError: MALFORMED_SESSION if one was written to since it was used.
        """
        for tensor, version in self._large.values():
            if _version(tensor) != version:
                raise error(
                    Reason.MALFORMED_SESSION,
                    f"a tensor of shape {list(tensor.shape)} was changed after the session had "
                    "used it; use a .clone() of it in the session",
                )
        return {index: tensor for index, (tensor, _) in self._large.items()}

    def _add_small(self, tensor: torch.Tensor) -> int:
        spec = torch_codec.tensor_spec(tensor)
        spec.data = bytes(torch_codec.tensor_data(tensor))
        return self._place(spec.SerializeToString(), spec)

    def _add_large(self, tensor: torch.Tensor) -> int:
        if tensor.is_inference():
            # Such a tensor does not count what is written to it.
            tensor = tensor.clone()
        index = self._place(_looks(tensor), torch_codec.tensor_spec(tensor))
        # Held from now on, so that nothing else comes to lie where it lies.
        self._large.setdefault(index, (tensor, _version(tensor)))
        return index

    def _place(self, key: object, spec: Tensor) -> int:
        if key not in self._indices:
            self._indices[key] = len(self._specs)
            self._specs.append(spec)
        return self._indices[key]


def _looks(tensor: torch.Tensor) -> object:
    """Gives what two tensors have in common that show the same elements of the same memory."""
    layout = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return (*layout, tensor.is_conj(), tensor.is_neg(), _version(tensor))


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def session_tensors(
    session: session_pb2.Session, tensors: Mapping[int, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yields a session's list of tensors; large ones are the user's own, not copies.

    Args:
        session: the session.
        tensors: the large ones, by their place in the list.
    """
    for index, spec in enumerate(session.tensors):
        is_small = index not in tensors
        yield (
            torch_codec.tensor_from_data(spec, bytearray(spec.data)) if is_small else tensors[index]
        )

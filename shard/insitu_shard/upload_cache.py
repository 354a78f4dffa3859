"""Tensors that users brought, in a rank's memory, under the hash of their content.

The leader's `UploadCache` decides what is kept; the other ranks do as they are told.
"""

from __future__ import annotations

import asyncio
from collections import ChainMap, OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from insitu_wire import torch_codec
from insitu_wire.content_hash import content_hash, wrong_content
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, MutableMapping, Sequence

    from insitu_proto.v1.tensor_pb2 import Tensor
    from insitu_shard.engine.ranks import Ranks


class UploadCache:
    """Which uploads the group keeps: those that sessions hold, and the last used of the others.

    Attributes:
        tensors: the leader's own copies, least recently used first.
    """

    def __init__(self, max_bytes: int) -> None:
        """Makes an empty cache.

        Args:
            max_bytes: how much memory of each rank it may take.
        """
        self.tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._max_bytes = max_bytes
        # In the order in which sessions came to hold them.
        self._held: OrderedDict[str, dict[str, int]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """How much memory the tensors take on each rank."""
        return sum(tensor.nbytes for tensor in list(self.tensors.values()))

    def hold(self, session_id: str, tensors: Iterable[Tensor]) -> list[str]:
        """Keeps tensors for a session; gives the hashes of those to be stored.

        They are kept until the session is released, or others that come later need all the room: a
        session that was never released does not take it for ever.

        Raises:
            CapacityError: REQUEST_TOO_LARGE if they alone do not fit.
        """
        held = {tensor.content_hash: num_bytes(tensor) for tensor in tensors}
        if (size := sum(held.values())) > self._max_bytes:
            raise error(
                Reason.REQUEST_TOO_LARGE,
                f"the session brings tensors of {size:,} bytes, and the shard group keeps at most "
                f"{self._max_bytes:,}; bring fewer or smaller tensors",
                numBytes=size,
                maxBytes=self._max_bytes,
            )
        self._held.pop(session_id, None)
        self._held[session_id] = held
        while sum(ChainMap(*self._held.values()).values()) > self._max_bytes:
            self._held.popitem(last=False)
        for name in held:
            if name in self.tensors:
                self.tensors.move_to_end(name)
        return [name for name in held if name not in self.tensors]

    def release(self, session_id: str) -> None:
        """Lets a session's tensors make room for others."""
        self._held.pop(session_id, None)

    def make_room(self, size: int) -> list[str]:
        """Forgets tensors that no session holds, until there is room; gives their hashes."""
        held = frozenset[str]().union(*self._held.values())
        used, dropped = self.num_bytes, []
        for name in [name for name in self.tensors if name not in held]:
            if used + size <= self._max_bytes:
                break
            used -= self.tensors.pop(name).nbytes
            dropped.append(name)
        return dropped


async def receive_upload(spec: Tensor, chunks: AsyncIterator[bytes]) -> bytearray:
    """Gathers the elements of a tensor, and checks that they are what its hash says.

    Raises:
        InternalError: CHECKSUM_MISMATCH.
    """
    data = bytearray(num_bytes(spec))
    received = 0
    async for chunk in chunks:
        end = received + len(chunk)
        if end > len(data):
            raise wrong_content(spec, "more bytes than its shape has")
        data[received:end] = chunk
        received = end
    digest = await asyncio.to_thread(content_hash, spec, data)
    if received < len(data) or digest != spec.content_hash:
        raise wrong_content(spec, f"{received} bytes of the hash {digest}")
    return data


def keep_upload(
    uploads: MutableMapping[str, torch.Tensor],
    spec: Tensor,
    data: bytearray,
    *,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Puts a tensor where the model is: on all ranks, or on none. Every rank must call it.

    Raises:
        CapacityError: OUT_OF_MEMORY.
    """
    tensor: torch.Tensor | None = None
    with suppress(torch.OutOfMemoryError):
        tensor = torch_codec.tensor_from_data(spec, data).to(device)
    if ranks.any(tensor is None) or tensor is None:
        raise error(
            Reason.OUT_OF_MEMORY,
            f"the shard group has no memory for a tensor of {num_bytes(spec):,} bytes; bring "
            "smaller ones",
            numBytes=num_bytes(spec),
        )
    uploads[spec.content_hash] = tensor


def session_tensors(
    specs: Sequence[Tensor], uploads: Mapping[str, torch.Tensor], *, device: torch.device
) -> list[torch.Tensor]:
    """Gives a session's list of tensors, where the model is.

    Raises:
        SessionStateError: TENSOR_NOT_UPLOADED if one is not in the cache.
    """
    return [_tensor(spec, uploads).to(device) for spec in specs]


def _tensor(spec: Tensor, uploads: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if spec.WhichOneof("content") == "data":
        return torch_codec.tensor_from_data(spec, bytearray(spec.data))
    if spec.content_hash in uploads:
        return uploads[spec.content_hash]
    raise error(
        Reason.TENSOR_NOT_UPLOADED,
        f"the shard group lacks the tensor with content hash {spec.content_hash}; submit the "
        "session again",
        contentHash=spec.content_hash,
    )

"""Receives saved values."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm

from insitu_wire import torch_codec
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1 import result_pb2, scheduler_service_pb2


class Received(NamedTuple):
    """A saved value that has come back."""

    node_id: int
    """Id of its save node."""
    name: str
    """The user's variable, made unique; empty where the client did not name it."""
    value: object
    """The value."""


def download(
    responses: Iterable[scheduler_service_pb2.FetchResultResponse],
) -> Iterator[Received]:
    """Yields each saved value, under a progress bar where there are any.

    Raises:
        InternalError: CHECKSUM_MISMATCH, if what came is not what was sent.
    """
    stream = iter(responses)
    summary = next(stream).summary
    with tqdm(
        total=summary.num_bytes,
        unit="B",
        unit_scale=True,
        desc="Downloading result",
        disable=not summary.num_values,
    ) as progress:
        for response in stream:
            saved = response.saved_value
            data = bytearray()
            while len(data) < saved.num_bytes:
                chunk = next(stream).data
                data += chunk
                progress.update(len(chunk))
            _check(saved, data)
            value = torch_codec.decode(saved.value, data=data)
            yield Received(saved.node_id, saved.name, value)


def _check(saved: result_pb2.SavedValue, data: bytearray) -> None:
    if zlib.crc32(data) != saved.crc32:
        raise error(
            Reason.CHECKSUM_MISMATCH,
            f"the saved value {saved.name or saved.node_id} arrived damaged; run the session again",
            nodeId=saved.node_id,
        )

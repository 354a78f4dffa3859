"""Receives saved values."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from insitu_wire import torch_codec
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1 import result_pb2, scheduler_service_pb2


def download(
    responses: Iterable[scheduler_service_pb2.FetchResultResponse],
) -> Iterator[tuple[int, object]]:
    """Yields each saved value by the id of its save node, under a progress bar.

    Raises:
        InternalError: CHECKSUM_MISMATCH, if what came is not what was sent.
    """
    stream = iter(responses)
    summary = next(stream).summary
    with tqdm(
        total=summary.num_bytes, unit="B", unit_scale=True, desc="Downloading result"
    ) as progress:
        for response in stream:
            saved = response.saved_value
            data = bytearray()
            while len(data) < saved.num_bytes:
                chunk = next(stream).data
                data += chunk
                progress.update(len(chunk))
            _check(saved, data)
            yield saved.node_id, torch_codec.decode(saved.value, data=data)


def _check(saved: result_pb2.SavedValue, data: bytearray) -> None:
    if zlib.crc32(data) != saved.crc32:
        raise error(
            Reason.CHECKSUM_MISMATCH,
            f"the saved value {saved.name or saved.node_id} arrived damaged; run the session again",
            nodeId=saved.node_id,
        )

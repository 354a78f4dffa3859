"""Small messages of a stream travel together: each by itself costs more than what it carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse
from insitu_proto.v1.shard_service_pb2 import RunSegmentResponse
from insitu_wire.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ResponseT = TypeVar("ResponseT", FetchResultResponse, RunSegmentResponse)


def together(responses: Iterable[ResponseT], *, may_batch: bool = True) -> Iterator[ResponseT]:
    """Yields responses of which each carries, as its `more`, those that follow it.

    Args:
        responses: each without any `more`.
        may_batch: whether the receiver knows of `more`; if not they are passed on as they are.
    """
    first, size = None, 0
    for response in responses:
        num_bytes = response.ByteSize()
        if first is not None and may_batch and size + num_bytes <= CHUNK_BYTES:
            first.more.append(response)
            size += num_bytes
            continue
        if first is not None:
            yield first
        first, size = response, num_bytes
    if first is not None:
        yield first


def apart(response: ResponseT) -> Iterator[ResponseT]:
    """Yields a response, and those that it carries."""
    yield response
    yield from response.more

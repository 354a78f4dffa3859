"""Encodes what a segment tells as the contract's messages."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from insitu_proto.v1 import result_pb2, shard_service_pb2
from insitu_shard.engine import Finished, Logged, Saved, SegmentEvent, TraceStarted
from insitu_wire import torch_codec
from insitu_wire.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator


def to_responses(event: SegmentEvent) -> Iterator[shard_service_pb2.RunSegmentResponse]:
    """Yields the messages of one event; a saved value is followed by its data in chunks."""
    match event:
        case TraceStarted(trace_number=number):
            started = shard_service_pb2.TraceStarted(trace_number=number)
            yield shard_service_pb2.RunSegmentResponse(trace_started=started)
        case Logged(message=message):
            line = shard_service_pb2.LogLine(message=message)
            yield shard_service_pb2.RunSegmentResponse(log_line=line)
        case Saved():
            yield from _saved(event)
        case Finished(has_exited=has_exited):
            finished = shard_service_pb2.SegmentFinished(has_exited=has_exited)
            yield shard_service_pb2.RunSegmentResponse(finished=finished)


def _saved(event: Saved) -> Iterator[shard_service_pb2.RunSegmentResponse]:
    value, tensors = torch_codec.encode_saved(event.value)
    buffers = [torch_codec.tensor_data(tensor) for tensor in tensors]
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    header = result_pb2.SavedValue(
        node_id=event.node_id,
        name=event.name,
        value=value,
        num_bytes=sum(buffer.nbytes for buffer in buffers),
        crc32=checksum,
    )
    yield shard_service_pb2.RunSegmentResponse(saved_value=header)
    for buffer in buffers:
        for start in range(0, buffer.nbytes, CHUNK_BYTES):
            chunk = bytes(buffer[start : start + CHUNK_BYTES])
            yield shard_service_pb2.RunSegmentResponse(data=chunk)

"""Encodes what a segment tells as the contract's messages."""

from __future__ import annotations

import datetime
import zlib
from typing import TYPE_CHECKING

from insitu_proto.v1 import shard_service_pb2
from insitu_proto.v1.event_pb2 import Tokens
from insitu_proto.v1.result_pb2 import SavedValue
from insitu_shard.engine import (
    Finished,
    Logged,
    Saved,
    SegmentEvent,
    TokensChosen,
    TraceStarted,
)
from insitu_wire import torch_codec
from insitu_wire.error_codec import to_failure
from insitu_wire.errors import Error
from insitu_wire.limits import CHUNK_BYTES
from insitu_wire.saved_values import sealed

if TYPE_CHECKING:
    from collections.abc import Iterator


def to_responses(event: SegmentEvent | Error) -> Iterator[shard_service_pb2.RunSegmentResponse]:
    """Yields the messages of one event; a saved value is followed by its data in chunks."""
    match event:
        case TraceStarted(trace_number=number, num_tokens=num_tokens, seconds=seconds):
            started = shard_service_pb2.TraceStarted(trace_number=number, num_tokens=num_tokens)
            started.execution_time.FromTimedelta(datetime.timedelta(seconds=seconds))
            yield shard_service_pb2.RunSegmentResponse(trace_started=started)
        case Logged(message=message):
            line = shard_service_pb2.LogLine(message=message)
            yield shard_service_pb2.RunSegmentResponse(log_line=line)
        case TokensChosen(trace_number=number, step=step, token_ids=token_ids):
            tokens = Tokens(trace_number=number, step=step, token_ids=token_ids)
            yield shard_service_pb2.RunSegmentResponse(tokens=tokens)
        case Saved():
            yield from _saved(event)
        case Finished(has_exited=has_exited, seconds=seconds):
            finished = shard_service_pb2.SegmentFinished(has_exited=has_exited)
            finished.execution_time.FromTimedelta(datetime.timedelta(seconds=seconds))
            yield shard_service_pb2.RunSegmentResponse(finished=finished)
        case Error():
            yield shard_service_pb2.RunSegmentResponse(failure=to_failure(event))


def to_fetched(node_id: int, value: object) -> Iterator[shard_service_pb2.FetchValuesResponse]:
    """Yields the messages of a value that another group asks for."""
    header, chunks = _encoded(node_id, "", value)
    yield shard_service_pb2.FetchValuesResponse(value=header)
    for chunk in chunks:
        yield shard_service_pb2.FetchValuesResponse(data=chunk)


def _saved(event: Saved) -> Iterator[shard_service_pb2.RunSegmentResponse]:
    header, chunks = _encoded(event.node_id, event.name, event.value)
    yield shard_service_pb2.RunSegmentResponse(saved_value=header)
    for chunk in chunks:
        yield shard_service_pb2.RunSegmentResponse(data=chunk)


def _encoded(node_id: int, name: str, saved: object) -> tuple[SavedValue, Iterator[bytes]]:
    """Gives a value's header, and its elements in chunks."""
    value, tensors = torch_codec.encode_saved(saved)
    buffers = [torch_codec.tensor_data(tensor) for tensor in tensors]
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    num_bytes = sum(buffer.nbytes for buffer in buffers)
    header = sealed(
        SavedValue(node_id=node_id, name=name, value=value, num_bytes=num_bytes, crc32=checksum)
    )
    chunks = (
        bytes(buffer[start : start + CHUNK_BYTES])
        for buffer in buffers
        for start in range(0, buffer.nbytes, CHUNK_BYTES)
    )
    return header, chunks

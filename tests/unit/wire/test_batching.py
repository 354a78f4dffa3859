"""Small messages travel together, large ones by themselves."""

from __future__ import annotations

import pytest

from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse
from insitu_proto.v1.shard_service_pb2 import LogLine, RunSegmentResponse
from insitu_wire.batching import apart, together
from insitu_wire.limits import CHUNK_BYTES


def _lines(count: int) -> list[RunSegmentResponse]:
    return [RunSegmentResponse(log_line=LogLine(message=str(line))) for line in range(count)]


def _chunks(*sizes: int) -> list[FetchResultResponse]:
    return [FetchResultResponse(data=bytes([size % 251]) * size) for size in sizes]


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_small_messages_are_one_and_come_apart_in_order(count: int) -> None:
    packed = list(together(_lines(count)))
    assert len(packed) == min(count, 1)
    lines = [part.log_line.message for response in packed for part in apart(response)]
    assert lines == [str(line) for line in range(count)]


def test_no_message_is_larger_than_a_chunk_and_its_own_first() -> None:
    sizes = [10, CHUNK_BYTES, 10, CHUNK_BYTES // 2, CHUNK_BYTES // 2, 10, 2 * CHUNK_BYTES]
    packed = list(together(_chunks(*sizes)))
    assert [len(part.data) for each in packed for part in apart(each)] == sizes
    assert [1 + len(each.more) for each in packed] == [1, 1, 2, 2, 1]
    assert all(each.ByteSize() < CHUNK_BYTES + 1000 for each in packed[:-1])


def test_who_does_not_know_of_it_gets_each_alone() -> None:
    assert list(together(_lines(3), may_batch=False)) == _lines(3)

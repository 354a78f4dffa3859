"""A download that breaks goes on where it broke, and is checked as a whole."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest
import torch

from insitu import InternalError, UnavailableError
from insitu.backends import _resuming
from insitu.backends._download import download
from insitu_proto.v1.result_pb2 import SavedValue
from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse, ResultSummary
from insitu_wire import torch_codec
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 8
VALUES = [torch.arange(10.0), 7, torch.arange(3.0), None]


class Server:
    """Serves some values, and breaks off after some numbers of messages, a stream each.

    Of as many as are lost it only says that there are so many more.
    """

    def __init__(self, *breaks: int, num_lost: int = 0) -> None:
        self._breaks = list(breaks)
        self.asked: list[tuple[int, int]] = []
        self._num_lost = num_lost
        self._saved = [_encoded(node_id, value) for node_id, value in enumerate(VALUES, start=1)]

    def __call__(self, num_values: int, num_bytes: int) -> Iterator[FetchResultResponse]:
        self.asked.append((num_values, num_bytes))
        left = self._breaks.pop(0) if self._breaks else None
        for message in self._messages(num_values, num_bytes):
            if left == 0:
                raise error(Reason.SERVER_UNREACHABLE, "gone")
            left = None if left is None else left - 1
            yield message

    def damage(self) -> None:
        self._saved[0][1][3] ^= 1

    def _messages(self, num_values: int, num_bytes: int) -> Iterator[FetchResultResponse]:
        size = sum(len(data) for _, data in self._saved)
        summary = ResultSummary(num_values=len(self._saved) + self._num_lost, num_bytes=size)
        yield FetchResultResponse(summary=summary)
        for header, data in self._saved[num_values:]:
            yield FetchResultResponse(saved_value=header)
            for start in range(num_bytes, len(data), CHUNK_BYTES):
                yield FetchResultResponse(data=bytes(data[start : start + CHUNK_BYTES]))
            num_bytes = 0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "MAX_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("num_messages", range(12))
def test_it_goes_on_where_it_broke(num_messages: int) -> None:
    server = Server(num_messages)
    received = list(download(server))
    assert [one.node_id for one in received] == [1, 2, 3, 4]
    assert torch.equal(received[0].value, VALUES[0])  # type: ignore[arg-type]
    assert (received[1].value, received[3].value) == (7, None)
    assert len(server.asked) == 2


def test_it_asks_for_what_it_lacks() -> None:
    server = Server(4, 5, 2)
    list(download(server))
    assert server.asked == [(0, 0), (0, 16), (1, 0), (2, 0)]


def test_it_may_break_any_number_of_times_as_long_as_something_comes() -> None:
    server = Server(*[3] * 50)
    assert len(list(download(server))) == 4


def test_a_server_that_stays_away_is_given_up() -> None:
    server = Server(3, *[0] * 100)
    with pytest.raises(UnavailableError):
        list(download(server))
    assert len(server.asked) == _resuming.MAX_ATTEMPTS


def test_parts_of_several_streams_are_checked_together() -> None:
    server = Server(4)
    server.damage()
    with pytest.raises(InternalError, match="arrived damaged"):
        list(download(server))


def test_a_result_that_ends_early_is_not_taken_for_whole() -> None:
    with pytest.raises(InternalError, match="after 4 of 5 saved values"):
        list(download(Server(num_lost=1)))


def _encoded(node_id: int, value: object) -> tuple[SavedValue, bytearray]:
    message, tensors = torch_codec.encode_saved(value)
    data = bytearray(b"".join(bytes(torch_codec.tensor_data(tensor)) for tensor in tensors))
    return SavedValue(
        node_id=node_id, value=message, num_bytes=len(data), crc32=zlib.crc32(data)
    ), data

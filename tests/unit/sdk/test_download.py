"""A download that breaks goes on where it broke, and is checked as a whole."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest
import torch
from google.protobuf.message import DecodeError

from insitu import InternalError, UnavailableError
from insitu.backends import _resuming
from insitu.backends._download import Received, download
from insitu_proto.v1.result_pb2 import SavedValue
from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse, ResultSummary
from insitu_wire import torch_codec
from insitu_wire.errors import Reason, error
from insitu_wire.saved_values import sealed

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


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_no_byte_of_a_result_changes_on_its_way_unnoticed(bit: int) -> None:
    sent = list(Server()(0, 0))
    expected = [(one.node_id, one.name, one.value) for one in download(Server())]
    num_noticed = 0
    for place, message in enumerate(sent):
        encoded = message.SerializeToString()
        for at in range(len(encoded)):
            changed = bytearray(encoded)
            changed[at] ^= 1 << bit
            try:
                came = FetchResultResponse.FromString(bytes(changed))
            except DecodeError:
                continue  # gRPC ends the stream
            received = [*sent[:place], came, *sent[place + 1 :]]
            found, reason = _outcome(received)
            if reason is None:
                assert all(_is_as_sent(*pair) for pair in zip(found, expected, strict=True))
            else:
                assert reason is Reason.CHECKSUM_MISMATCH
                num_noticed += 1
    assert num_noticed > 50


def _outcome(received: list[FetchResultResponse]) -> tuple[list[Received], Reason | None]:
    try:
        return list(download(lambda *_: received)), None
    except InternalError as err:
        return [], err.reason


def _is_as_sent(one: Received, expected: tuple[int, str, object]) -> bool:
    node_id, name, value = expected
    if (one.node_id, one.name) != (node_id, name):
        return False
    if isinstance(value, torch.Tensor):
        return isinstance(one.value, torch.Tensor) and torch.equal(one.value, value)
    return one.value == value


def _encoded(node_id: int, value: object) -> tuple[SavedValue, bytearray]:
    message, tensors = torch_codec.encode_saved(value)
    data = bytearray(b"".join(bytes(torch_codec.tensor_data(tensor)) for tensor in tensors))
    header = SavedValue(node_id=node_id, value=message, num_bytes=len(data), crc32=zlib.crc32(data))
    return sealed(header), data

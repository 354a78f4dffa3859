"""Receives saved values; a download that breaks goes on where it broke."""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from insitu.backends._resuming import Resuming
from insitu_wire.errors import Error, Reason, UnavailableError, error
from insitu_wire.saved_values import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from insitu_proto.v1 import result_pb2
    from insitu_proto.v1.scheduler_service_pb2 import FetchResultResponse, ResultSummary

    Fetch = Callable[[int, int], Iterable[FetchResultResponse]]


class Received(NamedTuple):
    """A saved value that has come back."""

    node_id: int
    """Id of its save node."""
    name: str
    """The user's variable, made unique; empty where the client did not name it."""
    value: object
    """The value."""


def download(fetch: Fetch) -> Iterator[Received]:
    """Yields each saved value, under a progress bar where there are any.

    Args:
        fetch: opens the stream, given how many values there are already, and how many bytes of the
            data of the next.

    Raises:
        InternalError: CHECKSUM_MISMATCH, if what came is not what was sent.
        UnavailableError: the stream broke, and the server stays away.
    """
    receiver, resuming = _Receiver(), Resuming()
    with receiver:
        while True:
            before = receiver.place
            try:
                yield from receiver.take(fetch(*before))
            except UnavailableError as err:
                resuming.broke(err, has_gone_on=receiver.place != before)
            else:
                receiver.check_all_came()
                return


class _Receiver:
    """What has come so far, over all the streams that broke."""

    def __init__(self) -> None:
        self._num_values = 0
        self._num_announced: int | None = None
        self._saved: result_pb2.SavedValue | None = None
        self._data = bytearray()
        self._crc32 = 0
        self._open = ExitStack()
        self._progress: Any = None

    @property
    def place(self) -> tuple[int, int]:
        """How many values are here, and how many bytes of the data of the next."""
        return self._num_values, len(self._data)

    def __enter__(self) -> None:
        self._open.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def take(self, responses: Iterable[FetchResultResponse]) -> Iterator[Received]:
        """Takes in one stream, and yields the values that are complete then."""
        for response in responses:
            kind = response.WhichOneof("kind")
            if kind != "summary" and self._num_announced is None:
                raise _without_beginning()
            match kind:
                case "summary":
                    self._show(response.summary)
                case "saved_value":
                    self._begin(response.saved_value)
                case "data":
                    self._add(response.data)
            if self._saved is not None and len(self._data) >= self._saved.num_bytes:
                yield self._complete(self._saved)

    def check_all_came(self) -> None:
        """Checks, once a stream has come to its end, that nothing is missing.

        Raises:
            InternalError: CHECKSUM_MISMATCH if there is.
        """
        if self._num_values != self._num_announced:
            raise error(
                Reason.CHECKSUM_MISMATCH,
                f"the result ended after {self._num_values} of {self._num_announced} saved values; "
                "fetch it again",
                numValues=self._num_values,
            )

    def _show(self, summary: ResultSummary) -> None:
        self._num_announced = summary.num_values
        if self._progress is None:
            self._progress = self._open.enter_context(
                tqdm(
                    total=summary.num_bytes,
                    unit="B",
                    unit_scale=True,
                    desc="Downloading result",
                    disable=not summary.num_values,
                )
            )

    def _begin(self, saved: result_pb2.SavedValue) -> None:
        if not is_whole(saved):
            raise _damaged(saved)
        if self._saved is not None and self._saved != saved:
            raise _damaged(self._saved)
        self._saved = saved

    def _add(self, data: bytes) -> None:
        self._data += data
        # Now, while it is in the processor's cache, and others are on their way.
        self._crc32 = zlib.crc32(data, self._crc32)
        self._progress.update(len(data))

    def _complete(self, saved: result_pb2.SavedValue) -> Received:
        data, self._data, self._saved = self._data, bytearray(), None
        crc32, self._crc32 = self._crc32, 0
        self._num_values += 1
        if crc32 != saved.crc32:
            raise _damaged(saved)
        # With torch, which takes seconds to import: commands that fetch no value do without it.
        from insitu_wire import torch_codec

        return Received(saved.node_id, saved.name, torch_codec.decode(saved.value, data=data))


def _without_beginning() -> Error:
    return error(
        Reason.CHECKSUM_MISMATCH,
        "the result came without its beginning, which tells how many values there are; fetch it "
        "again",
    )


def _damaged(saved: result_pb2.SavedValue) -> Error:
    return error(
        Reason.CHECKSUM_MISMATCH,
        f"the saved value {saved.name or saved.node_id} arrived damaged; run the session again",
        nodeId=saved.node_id,
    )

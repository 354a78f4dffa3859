"""Saved values on disk: one file a session, written as values arrive, read back in chunks."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO
from weakref import WeakValueDictionary

from insitu_proto.v1.result_pb2 import SavedValue
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import CHUNK_BYTES
from insitu_wire.saved_values import is_whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from insitu_scheduler.object_store import ObjectStore
    from insitu_scheduler.queue import SessionId

# A record is a head, the header (a SavedValue), and as many bytes as that announces. A head is the
# header's length and CRC-32, and the CRC-32 of both. One of no length ends a session's file.
_HEAD = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A saved value and where its data begins in the session's file."""

    header: SavedValue
    offset: int


class ResultStore:
    """The results of all sessions, in a folder of their own each.

    What a session saved is on disk, or in the object store, before its end is told.
    """

    def __init__(self, folder: Path, store: ObjectStore | None = None) -> None:
        """Makes it.

        Args:
            folder: where results are, or are gathered while their session runs.
            store: where they are moved to once it has ended; None to stay in the folder.
        """
        self._folder = folder
        self._store = store
        self._writers: WeakValueDictionary[SessionId, ResultWriter] = WeakValueDictionary()

    def writer(self, session_id: SessionId) -> ResultWriter:
        """Begins to write a session's values; its file is made with the first."""
        keep = partial(self._store.put, _name(session_id)) if self._store else None
        writer = ResultWriter(self._path(session_id), keep)
        self._writers[session_id] = writer
        return writer

    async def list_values(
        self, session_id: SessionId, *, has_completed: bool = False
    ) -> list[StoredValue]:
        """Gives the values that a session has saved completely, also while it saves more.

        Args:
            session_id: the session.
            has_completed: whether it ended well, and all it saved must be there.

        Raises:
            InternalError: CHECKSUM_MISMATCH, if what is stored is not what was written.
        """
        if writer := self._writers.get(session_id):
            writer.flush()
        open_file = partial(self._open, session_id)
        return await asyncio.to_thread(_scan, open_file, has_completed=has_completed)

    async def read(
        self, session_id: SessionId, values: Sequence[StoredValue], *, num_received: int = 0
    ) -> AsyncIterator[list[SavedValue | bytes]]:
        """Yields, a few at once, each value's header followed by its data in chunks.

        A chunk has 1 MiB at most, and what is yielded at once less than two.

        Args:
            session_id: the session.
            values: which.
            num_received: how many bytes of the first one's data to leave out.
        """
        batches = _batches(partial(self._open, session_id), values, num_received)
        # Read while the one before is on its way.
        following = _begin_reading(batches)
        try:
            while (batch := await following) is not None:
                following = _begin_reading(batches)
                yield batch
        finally:
            # Whoever has gone away leaves no thread behind that reads.
            await asyncio.wait([following])

    async def delete(self, session_id: SessionId) -> None:
        """Deletes what a session has saved."""
        folder = self._path(session_id).parent
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.delete, session_id)

    def _open(self, session_id: SessionId) -> BinaryIO | None:
        """Opens a session's file, wherever it is; None if it has saved nothing."""
        if (path := self._path(session_id)).exists():
            return path.open("rb")
        return self._store.open(_name(session_id)) if self._store else None

    def _path(self, session_id: SessionId) -> Path:
        return self._folder / _name(session_id)


class ResultWriter:
    """Appends values to one session's file, checking that they are what was announced."""

    def __init__(self, path: Path, keep: Callable[[Path], None] | None = None) -> None:
        """Makes it; the file is made with the first value.

        Args:
            path: the file.
            keep: copies the file to where it stays, at the end; None if it stays itself.
        """
        self._path = path
        self._keep = keep
        self._file: BinaryIO | None = None
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._header = SavedValue()
        self._received_bytes = 0
        self._kept_bytes = 0
        self._crc32 = 0

    async def begin(self, header: SavedValue) -> None:
        """Starts a value.

        Raises:
            InternalError: CHECKSUM_MISMATCH if the value before is not complete, or the header is
                not as it was sent.
        """
        self.check_complete()
        if not is_whole(header):
            raise error(
                Reason.CHECKSUM_MISMATCH,
                f"the header of saved value {header.node_id} came damaged; run the session again",
                nodeId=header.node_id,
            )
        self._header, self._received_bytes, self._kept_bytes, self._crc32 = header, 0, 0, 0
        encoded = header.SerializeToString()
        await self._append(_head(encoded) + encoded)

    async def write(self, data: bytes) -> None:
        """Adds bytes to the value that was begun last.

        Raises:
            InternalError: CHECKSUM_MISMATCH if they are more, or others, than announced.
        """
        self._received_bytes += len(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        if self._received_bytes > self._header.num_bytes:
            raise self._mismatch(f"{self._received_bytes} bytes or more")
        if self._received_bytes == self._header.num_bytes and self._crc32 != self._header.crc32:
            raise self._mismatch(f"CRC-32 {self._crc32:#010x}")
        self._kept_bytes += len(data)
        await self._append(data)

    def check_complete(self) -> None:
        """Checks that all of the last value has come.

        Raises:
            InternalError: CHECKSUM_MISMATCH if not.
        """
        if self._received_bytes != self._header.num_bytes:
            raise self._mismatch(f"{self._received_bytes} bytes")

    def flush(self) -> None:
        """Writes what is buffered, less than a chunk: quick enough for the event loop."""
        if buffer := self._take_buffer():
            self._write(buffer)

    async def close(self) -> None:
        """Writes what is buffered; a value that is not complete will not be read back."""
        if self._buffer or self._file:
            if self._kept_bytes == self._header.num_bytes:
                self._buffer.append(_head(b""))
            await asyncio.to_thread(self._write_and_close, self._take_buffer())

    async def _append(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes >= CHUNK_BYTES:
            await asyncio.to_thread(self._write, self._take_buffer())

    def _take_buffer(self) -> list[bytes]:
        """Empties the buffer, so that a thread and the event loop never write the same twice."""
        buffer, self._buffer, self._buffered_bytes = self._buffer, [], 0
        return buffer

    def _write(self, buffer: list[bytes]) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Whoever reads what an attempt before has saved goes on with that.
            self._path.unlink(missing_ok=True)
            self._file = self._path.open("wb")
        self._file.writelines(buffer)
        self._file.flush()

    def _write_and_close(self, buffer: list[bytes]) -> None:
        self._write(buffer)
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        _sync_folder(self._path.parent)
        if self._keep is not None:
            self._keep(self._path)
            self._path.unlink()

    def _mismatch(self, got: str) -> Error:
        header = self._header
        return error(
            Reason.CHECKSUM_MISMATCH,
            f"saved value {header.node_id} came with {got}; {header.num_bytes} bytes with CRC-32 "
            f"{header.crc32:#010x} were announced; run the session again",
            nodeId=header.node_id,
        )


def _name(session_id: SessionId) -> str:
    return f"{session_id}/values.bin"


def _sync_folder(folder: Path) -> None:
    """Has the folder's entries on disk, too: a file without its name is lost."""
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _head(encoded: bytes) -> bytes:
    head = _HEAD.pack(len(encoded), zlib.crc32(encoded))
    return head + _CHECKSUM.pack(zlib.crc32(head))


def _scan(open_file: Callable[[], BinaryIO | None], *, has_completed: bool) -> list[StoredValue]:
    file = open_file()
    if file is None:
        return []
    values: list[StoredValue] = []
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while (encoded := _next_header(file, len(values))) is not None:
            if not encoded:
                return values
            value = StoredValue(SavedValue.FromString(encoded), file.tell())
            if value.offset + value.header.num_bytes > size:
                break
            values.append(value)
            file.seek(value.header.num_bytes, os.SEEK_CUR)
    if has_completed:
        raise _damaged(len(values), "it ends there")
    return values


def _next_header(file: BinaryIO, num_before: int) -> bytes | None:
    """Reads a header, empty at the end of what a session saved; None where the file ends before."""
    head = file.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES:
        return None
    length, checksum = _HEAD.unpack_from(head)
    if head[_HEAD.size :] != _CHECKSUM.pack(zlib.crc32(head[: _HEAD.size])):
        raise _damaged(num_before, "what follows is no head of a value")
    encoded = file.read(length)
    if len(encoded) < length:
        return None
    if zlib.crc32(encoded) != checksum:
        raise _damaged(num_before, "the header of the next is not as it was written")
    return encoded


def _damaged(num_before: int, why: str) -> Error:
    return error(
        Reason.CHECKSUM_MISMATCH,
        f"what was stored of the session is damaged after {num_before} saved values: {why}; run "
        "the session again",
        numValues=num_before,
    )


def _begin_reading(
    batches: Iterator[list[SavedValue | bytes]],
) -> asyncio.Task[list[SavedValue | bytes] | None]:
    return asyncio.create_task(asyncio.to_thread(next, batches, None))


def _batches(
    open_file: Callable[[], BinaryIO | None], values: Sequence[StoredValue], num_received: int
) -> Iterator[list[SavedValue | bytes]]:
    """Groups small values, so that each costs no turn of a thread of its own."""
    batch: list[SavedValue | bytes] = []
    batch_bytes = 0
    for part in _parts(open_file, values, num_received):
        batch.append(part)
        batch_bytes += len(part) if isinstance(part, bytes) else part.ByteSize()
        if batch_bytes >= CHUNK_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    yield batch


def _parts(
    open_file: Callable[[], BinaryIO | None], values: Sequence[StoredValue], num_received: int
) -> Iterator[SavedValue | bytes]:
    file = open_file() if values else None
    if file is None:
        return
    with file:
        for value in values:
            yield value.header
            file.seek(value.offset + num_received)
            left, num_received = value.header.num_bytes - num_received, 0
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    raise _cut_short(value.header)
                left -= len(data)
                yield data


def _cut_short(header: SavedValue) -> Error:
    return error(
        Reason.CHECKSUM_MISMATCH,
        f"what was stored of saved value {header.node_id} ends before its {header.num_bytes} bytes "
        "do; run the session again",
        nodeId=header.node_id,
    )

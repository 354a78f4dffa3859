"""Tensors that users brought: on disk, each once, under the hash of its content."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import struct
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from google.protobuf.message import DecodeError

from insitu_proto.v1.tensor_pb2 import Tensor
from insitu_scheduler.refusals import RETRY_SECONDS
from insitu_wire.content_hash import hasher, wrong_content
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from pathlib import Path

    from insitu_scheduler.queue import SessionId
    from insitu_scheduler.shards import ShardClient

# A file is the description's length, the description (a Tensor), and its elements.
_LENGTH = struct.Struct("<I")
_CONTENT = "tensor.bin"


@dataclass(slots=True)
class _Upload:
    tensor: Tensor
    num_bytes: int
    owners: set[str] = field(default_factory=set)
    """Who has uploaded it, by the hash of the user's name; to others it is not there."""


class UploadStore:
    """The uploads of all users, in a folder of their own each, within a budget.

    Each user has to upload a tensor once, also if another did before: who knows a hash only is
    neither told that the tensor is here nor given it.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._drafts = folder / "drafts"
        self._max_bytes = max_bytes
        # Least recently used first.
        self._uploads: OrderedDict[str, _Upload] = OrderedDict()
        self._reserved_bytes = 0
        self._held: dict[SessionId, frozenset[str]] = {}

    @property
    def num_bytes(self) -> int:
        """How many bytes of tensors are kept."""
        return sum(upload.num_bytes for upload in list(self._uploads.values()))

    async def open(self) -> None:
        """Finds what an earlier process has left, and removes what it did not finish."""
        self._uploads = await asyncio.to_thread(self._scan)
        self._make_room(0)

    def missing(self, user: str, content_hashes: Iterable[str]) -> list[str]:
        """Gives those of some tensors that the user has to upload; the others are used by this."""
        return [name for name in dict.fromkeys(content_hashes) if not self._use(user, name)]

    def hold(self, session_id: SessionId, user: str, tensors: Sequence[Tensor]) -> None:
        """Keeps the uploads that a session uses, until it is released.

        Raises:
            Error: TENSOR_NOT_UPLOADED for those that the user has to upload first,
                MALFORMED_SESSION for one that has another shape.
        """
        uploads = {tensor.content_hash: tensor for tensor in tensors if tensor.content_hash}
        self._check_fits(sum(map(num_bytes, uploads.values())))
        if missing := self.missing(user, uploads):
            raise error(
                Reason.TENSOR_NOT_UPLOADED,
                f"{len(missing)} of the session's tensors are not uploaded, the first with content "
                f"hash {missing[0]}; upload them and submit the session again",
                contentHash=missing[0],
                count=len(missing),
            )
        for name, tensor in uploads.items():
            if self._uploads[name].tensor != tensor:
                raise error(
                    Reason.MALFORMED_SESSION,
                    f"the session has tensor {name} with shape {list(tensor.shape)}; it was "
                    f"uploaded with {list(self._uploads[name].tensor.shape)}",
                    contentHash=name,
                )
        if uploads:
            self._held[session_id] = frozenset(uploads)

    def release(self, session_id: SessionId) -> None:
        """Lets a session's uploads make room for others."""
        self._held.pop(session_id, None)

    async def receive(self, user: str, tensor: Tensor, chunks: AsyncIterator[bytes]) -> None:
        """Takes in a tensor.

        Raises:
            Error: CHECKSUM_MISMATCH if it is not what its hash says, STORAGE_FULL if all that is
                kept is in use, REQUEST_TOO_LARGE if it can not fit at all.
        """
        size = num_bytes(tensor)
        self._check_fits(size)
        self._make_room(size)
        draft = self._drafts / uuid.uuid4().hex
        self._reserved_bytes += size
        try:
            await _write(draft / _CONTENT, tensor, chunks)
            self._add(user, tensor, draft)
        finally:
            self._reserved_bytes -= size
            await asyncio.to_thread(shutil.rmtree, draft, ignore_errors=True)

    def forget(self, content_hash: str) -> None:
        """Removes a tensor, for all its users."""
        del self._uploads[content_hash]
        # Out of the way at once, for the tensor may come again; the disk frees it meanwhile.
        doomed = (self._folder / content_hash).rename(self._drafts / uuid.uuid4().hex)
        remove = partial(shutil.rmtree, doomed, ignore_errors=True)
        asyncio.get_running_loop().run_in_executor(None, remove)

    async def read(self, content_hash: str) -> AsyncIterator[bytes]:
        """Yields the elements of a tensor that is held, in chunks of at most 1 MiB."""
        path = self._folder / content_hash / _CONTENT
        num_read = 0
        # Opened anew for each chunk: who reads may go away at any of them.
        while data := await asyncio.to_thread(_read_chunk, path, num_read):
            yield data
            num_read += len(data)

    def _use(self, user: str, content_hash: str) -> bool:
        """Marks a tensor as used last, if it is there for this user."""
        upload = self._uploads.get(content_hash)
        if upload is None or _owner(user) not in upload.owners:
            return False
        self._uploads.move_to_end(content_hash)
        # Exact, unlike what the file system would write: a later process goes by it.
        now = time.time_ns()
        os.utime(self._folder / content_hash, ns=(now, now))
        return True

    def _check_fits(self, size: int) -> None:
        if size > self._max_bytes:
            raise error(
                Reason.REQUEST_TOO_LARGE,
                f"the session brings tensors of {size:,} bytes, and the server keeps at most "
                f"{self._max_bytes:,}; bring fewer or smaller tensors",
                numBytes=size,
                maxBytes=self._max_bytes,
            )

    def _make_room(self, size: int) -> None:
        """Removes the least recently used uploads that no session holds, until there is room."""
        used = self.num_bytes + self._reserved_bytes
        held = frozenset[str]().union(*self._held.values())
        for name in [name for name in self._uploads if name not in held]:
            if used + size <= self._max_bytes:
                return
            used -= self._uploads[name].num_bytes
            self.forget(name)
        if used + size > self._max_bytes:
            raise error(
                Reason.STORAGE_FULL,
                f"there is no room for a tensor of {size:,} bytes: what the server keeps is in use "
                "by sessions that wait or run; try again later",
                retry_after_seconds=RETRY_SECONDS,
                numBytes=size,
            )

    def _add(self, user: str, tensor: Tensor, draft: Path) -> None:
        """Keeps a tensor that has come whole; one that is here already gets another owner."""
        name, folder = tensor.content_hash, self._folder / tensor.content_hash
        if name not in self._uploads:
            draft.rename(folder)
            self._uploads[name] = _Upload(tensor, num_bytes(tensor))
        (folder / f"{_owner(user)}.owner").touch()
        self._uploads[name].owners.add(_owner(user))
        self._use(user, name)

    def _scan(self) -> OrderedDict[str, _Upload]:
        shutil.rmtree(self._drafts, ignore_errors=True)
        self._drafts.mkdir(parents=True)
        folders = [path for path in self._folder.iterdir() if path != self._drafts]
        folders.sort(key=lambda path: path.stat().st_mtime_ns)
        return OrderedDict(
            (folder.name, upload) for folder in folders if (upload := _found(folder)) is not None
        )


async def bring_uploads(
    shard: ShardClient, session_id: SessionId, tensors: Sequence[Tensor], store: UploadStore
) -> None:
    """Sees that a shard group has the uploads of a session; it is sent those that it lacks.

    Raises:
        Error: the group can not take them, or is lost.
    """
    uploads = {tensor.content_hash: tensor for tensor in tensors if tensor.content_hash}
    if not uploads:
        return
    for name in await shard.hold_uploads(session_id, list(uploads.values())):
        try:
            await shard.store_upload(uploads[name], store.read(name))
        except Error as err:
            if err.reason is Reason.CHECKSUM_MISMATCH:
                # The disk has it wrong: its user uploads it again.
                store.forget(name)
            raise


async def _write(path: Path, tensor: Tensor, chunks: AsyncIterator[bytes]) -> None:
    """Writes a tensor to a file, and checks that it is what its hash says."""
    path.parent.mkdir()
    digest, left = hasher(tensor), num_bytes(tensor)
    with path.open("wb") as file:
        encoded = tensor.SerializeToString()
        file.write(_LENGTH.pack(len(encoded)) + encoded)
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                raise wrong_content(tensor, "more bytes than its shape has")
            await asyncio.to_thread(_append, file, digest, chunk)
    if left:
        raise wrong_content(tensor, f"{left} bytes missing")
    if digest.hexdigest() != tensor.content_hash:
        raise wrong_content(tensor, f"content of the hash {digest.hexdigest()}")


def _append(file: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    file.write(chunk)
    digest.update(chunk)


def _found(folder: Path) -> _Upload | None:
    """Reads what there is of an upload; None, and it is removed, if it is not whole."""
    try:
        with (folder / _CONTENT).open("rb") as file:
            tensor = _read_tensor(file)
            size = (folder / _CONTENT).stat().st_size - file.tell()
    except (OSError, struct.error, DecodeError):
        size, tensor = -1, Tensor()
    if tensor.content_hash != folder.name or size != num_bytes(tensor):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return _Upload(tensor, size, {path.stem for path in folder.glob("*.owner")})


def _read_tensor(file: BinaryIO) -> Tensor:
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    return Tensor.FromString(file.read(length))


def _read_chunk(path: Path, num_read: int) -> bytes:
    with path.open("rb") as file:
        _read_tensor(file)
        file.seek(num_read, os.SEEK_CUR)
        return file.read(CHUNK_BYTES)


def _owner(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()

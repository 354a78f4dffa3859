"""Uploads stay on disk within a budget, and are there only for those who uploaded them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_scheduler.queue import SessionId
from insitu_scheduler.uploads import UploadStore
from insitu_wire.content_hash import content_hash
from insitu_wire.errors import Error, Reason

SESSION = SessionId("s1")


def tensor(data: bytes) -> Tensor:
    spec = Tensor(dtype=Dtype.DTYPE_UINT8, shape=[len(data)])
    spec.content_hash = content_hash(spec, data)
    return spec


A, B, C = (tensor(letter * 4) for letter in (b"a", b"b", b"c"))


async def upload(store: UploadStore, spec: Tensor, *chunks: bytes, user: str = "ann") -> None:
    async def sent() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    await store.receive(user, spec, sent())


async def opened(folder: Path, max_bytes: int = 100) -> UploadStore:
    store = UploadStore(folder, max_bytes=max_bytes)
    await store.open()
    return store


def missing(store: UploadStore, *specs: Tensor, user: str = "ann") -> list[str]:
    return store.missing(user, [spec.content_hash for spec in specs])


async def read(store: UploadStore, spec: Tensor) -> bytes:
    return b"".join([chunk async for chunk in store.read(spec.content_hash)])


def on_disk(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")]


async def test_an_upload_is_there_for_its_user_and_after_a_restart(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await upload(store, A, b"aa", b"", b"aa")
    for again in (store, await opened(tmp_path)):
        assert missing(again, A, B, B) == [B.content_hash]
        assert await read(again, A) == b"aaaa"
        assert again.num_bytes == 4


async def test_others_are_not_told_of_it_until_they_upload_it_too(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await upload(store, A, b"aaaa")
    assert missing(store, A, user="bob") == [A.content_hash]
    with pytest.raises(Error) as caught:
        store.hold(SESSION, "bob", [A])
    assert caught.value.reason is Reason.TENSOR_NOT_UPLOADED
    await upload(store, A, b"aaaa", user="bob")
    for again in (store, await opened(tmp_path)):
        assert not missing(again, A, user="bob")
        assert not missing(again, A, user="ann")
        assert again.num_bytes == 4


@pytest.mark.parametrize("chunks", [(b"aaab",), (b"aaa",), (b"aaaa", b"a"), ()], ids=str)
async def test_content_of_another_hash_is_refused_and_not_kept(
    tmp_path: Path, chunks: tuple[bytes, ...]
) -> None:
    store = await opened(tmp_path)
    with pytest.raises(Error) as caught:
        await upload(store, A, *chunks)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert missing(store, A)
    assert on_disk(tmp_path) == ["drafts"]


async def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    store = await opened(tmp_path, max_bytes=8)
    await upload(store, A, b"aaaa")
    await upload(store, B, b"bbbb")
    assert not missing(store, A)
    await upload(store, C, b"cccc")
    assert missing(store, A, B, C) == [B.content_hash]
    # The order of use outlives the process.
    smaller = await opened(tmp_path, max_bytes=4)
    assert missing(smaller, A, C) == [A.content_hash]


async def test_what_a_session_holds_makes_no_room(tmp_path: Path) -> None:
    store = await opened(tmp_path, max_bytes=8)
    await upload(store, A, b"aaaa")
    await upload(store, B, b"bbbb")
    store.hold(SESSION, "ann", [A])
    await upload(store, C, b"cccc")
    assert missing(store, A, B, C) == [B.content_hash]
    store.hold(SessionId("s2"), "ann", [C])
    with pytest.raises(Error) as caught:
        await upload(store, B, b"bbbb")
    assert caught.value.reason is Reason.STORAGE_FULL
    store.release(SESSION)
    await upload(store, B, b"bbbb")
    assert missing(store, A, B, C) == [A.content_hash]


async def test_a_session_that_brings_more_than_the_store_holds_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path, max_bytes=7)
    with pytest.raises(Error) as caught:
        store.hold(SESSION, "ann", [A, B])
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    assert "8 bytes" in caught.value.message


async def test_a_hash_with_another_shape_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await upload(store, A, b"aaaa")
    reshaped = Tensor(dtype=A.dtype, shape=[2, 2], content_hash=A.content_hash)
    with pytest.raises(Error, match=r"\[2, 2\]; it was uploaded with \[4\]"):
        store.hold(SESSION, "ann", [reshaped])


async def test_what_an_earlier_process_did_not_finish_is_removed(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await upload(store, A, b"aaaa")
    await upload(store, B, b"bbbb")
    (tmp_path / "drafts" / "half").mkdir()
    half, spoiled = (tmp_path / spec.content_hash / "tensor.bin" for spec in (A, B))
    half.write_bytes(half.read_bytes()[:-1])
    spoiled.write_bytes(b"\xff\xff")
    again = await opened(tmp_path)
    assert missing(again, A, B) == [A.content_hash, B.content_hash]
    assert on_disk(tmp_path) == ["drafts"]

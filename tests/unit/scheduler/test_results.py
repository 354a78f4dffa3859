"""Saved values come back as they were written, or not at all."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest

from insitu_proto.v1.result_pb2 import SavedValue
from insitu_proto.v1.value_pb2 import Value
from insitu_scheduler.object_store import ObjectStore
from insitu_scheduler.queue import SessionId
from insitu_scheduler.results import ResultStore
from insitu_wire.errors import ConfigurationError, InternalError, Reason
from insitu_wire.limits import CHUNK_BYTES
from insitu_wire.saved_values import sealed

if TYPE_CHECKING:
    from pathlib import Path

SESSION = SessionId("s1")


@pytest.fixture(params=["folder", "memory", "file"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> ResultStore:
    if request.param == "folder":
        return ResultStore(tmp_path)
    url = f"memory://{tmp_path}" if request.param == "memory" else f"file://{tmp_path}/stored"
    return ResultStore(tmp_path / "gathered", ObjectStore(url))


def header(node_id: int, data: bytes) -> SavedValue:
    return SavedValue(node_id=node_id, num_bytes=len(data), crc32=zlib.crc32(data))


async def write(store: ResultStore, values: dict[int, bytes]) -> None:
    writer = store.writer(SESSION)
    for node_id, data in values.items():
        await writer.begin(header(node_id, data))
        for start in range(0, len(data), CHUNK_BYTES):
            await writer.write(data[start : start + CHUNK_BYTES])
    writer.check_complete()
    await writer.close()


async def read(store: ResultStore) -> tuple[dict[int, bytes], int]:
    """Gives the values, and the size of the largest chunk."""
    values: dict[int, bytes] = {}
    largest, node_id = 0, 0
    batches = store.read(SESSION, await store.list_values(SESSION))
    for part in [part async for batch in batches for part in batch]:
        if isinstance(part, bytes):
            values[node_id] += part
            largest = max(largest, len(part))
        else:
            node_id = part.node_id
            values[node_id] = b""
    return values, largest


@pytest.mark.parametrize(
    "values",
    [
        {1: b"abc"},
        {1: b""},
        {node_id: bytes([node_id]) * 10 for node_id in range(200)},
        {1: b"x" * (2 * CHUNK_BYTES + 5), 2: b"small", 3: b"y" * CHUNK_BYTES},
    ],
    ids=["one", "empty", "many", "large"],
)
async def test_values_come_back_in_order_and_in_chunks(
    store: ResultStore, values: dict[int, bytes]
) -> None:
    await write(store, values)
    found, largest_chunk = await read(store)
    assert list(found.items()) == list(values.items())
    assert largest_chunk <= CHUNK_BYTES


async def test_a_session_that_saved_nothing_has_no_values(store: ResultStore) -> None:
    await write(store, {})
    assert await store.list_values(SESSION) == []


async def test_a_value_cut_short_is_left_out_and_those_before_it_stay(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"whole"))
    await writer.write(b"whole")
    await writer.begin(header(2, b"half of it"))
    await writer.write(b"half")
    await writer.close()
    assert (await read(store))[0] == {1: b"whole"}


async def test_a_file_that_was_cut_after_it_was_listed_is_told_of(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    await write(store, {1: b"whole", 2: b"cut short"})
    listed = await store.list_values(SESSION)
    path = tmp_path / SESSION / "values.bin"
    # The mark at the end, and the last byte of the value.
    path.write_bytes(path.read_bytes()[:-13])
    with pytest.raises(InternalError, match="saved value 2 ends before its 9 bytes"):
        _ = [batch async for batch in store.read(SESSION, listed)]


async def test_complete_values_can_be_read_while_more_are_written(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"whole"))
    await writer.write(b"whole")
    await writer.begin(header(2, b"two halves"))
    await writer.write(b"two ")
    assert (await read(store))[0] == {1: b"whole"}
    await writer.write(b"halves")
    assert (await read(store))[0] == {1: b"whole", 2: b"two halves"}
    await writer.close()
    assert (await read(store))[0] == {1: b"whole", 2: b"two halves"}


async def test_other_bytes_than_announced_are_refused(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"abc"))
    with pytest.raises(InternalError, match="saved value 1 came with CRC-32"):
        await writer.write(b"abd")


async def test_more_bytes_than_announced_are_refused(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"abc"))
    with pytest.raises(InternalError, match="4 bytes or more; 3 bytes"):
        await writer.write(b"abcd")


async def test_a_value_must_be_complete_before_the_next(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"abc"))
    with pytest.raises(InternalError, match="came with 0 bytes"):
        await writer.begin(header(2, b""))


async def test_what_is_in_the_object_store_is_not_on_disk_any_more_and_is_deleted_there(
    tmp_path: Path,
) -> None:
    store = ResultStore(tmp_path / "gathered", ObjectStore(f"file://{tmp_path}/stored"))
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"abc"))
    await writer.write(b"abc")
    await writer.close()
    assert [path.name for path in (tmp_path / "gathered").rglob("*.bin")] == []
    assert [path.name for path in (tmp_path / "stored").rglob("*.bin")] == ["values.bin"]
    # As another scheduler finds it.
    other = ResultStore(tmp_path / "other", ObjectStore(f"file://{tmp_path}/stored"))
    assert (await read(other))[0] == {1: b"abc"}
    await other.delete(SESSION)
    assert (await read(store))[0] == {}
    await other.delete(SESSION)


def test_a_store_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'nowhere://x', which can not be used"):
        ObjectStore("nowhere://x")


async def test_what_a_completed_session_saved_is_there_to_its_end(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    await write(store, {1: b"whole", 2: b"", 3: b"more"})
    path = tmp_path / SESSION / "values.bin"
    whole = path.read_bytes()
    assert len(await store.list_values(SESSION, has_completed=True)) == 3
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        # Of one that did not complete, less may be there.
        assert len(await store.list_values(SESSION)) <= 3
        with pytest.raises(InternalError, match=r"damaged after [0-3] saved values") as caught:
            await store.list_values(SESSION, has_completed=True)
        assert caught.value.reason is Reason.CHECKSUM_MISMATCH


async def test_a_value_that_came_damaged_is_not_taken_for_whole(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    writer = store.writer(SESSION)
    await writer.begin(header(1, b"abc"))
    with pytest.raises(InternalError):
        await writer.write(b"abd")
    await writer.close()
    assert await store.list_values(SESSION) == []


async def test_a_header_that_came_damaged_is_refused(store: ResultStore) -> None:
    writer = store.writer(SESSION)
    damaged = sealed(SavedValue(node_id=1, value=Value(float_value=0.5)))
    damaged.value.float_value = 0.25
    with pytest.raises(InternalError, match="header of saved value 1 came damaged"):
        await writer.begin(damaged)

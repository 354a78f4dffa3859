"""Downloads over connections that break go on where they broke."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from insitu import CONFIG
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.result_pb2 import SavedValue
from insitu_proto.v1.shard_service_pb2 import RunSegmentResponse
from insitu_proto.v1.value_pb2 import Value
from insitu_wire.batching import apart
from insitu_wire.errors import Error, NotFoundError, Reason
from insitu_wire.saved_values import sealed
from support.cut_proxy import CutProxy
from support.fake_shard import FakeShard, finished, saved, saving, trace_started

from .conftest import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest
    from insitu_scheduler.config import SchedulerConfig
    from insitu_scheduler.server import Server

NUM_BYTES = 32 * 1024 * 1024


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[CutProxy]:
    proxy = CutProxy(server.address)
    monkeypatch.setenv("INSITU_ENDPOINT", proxy.address)
    monkeypatch.setattr(CONFIG, "_api_key", "ann-key")
    yield proxy
    proxy.close()


async def save_much(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    yield trace_started(1)
    for part in saved(2, bytes(range(256)) * (NUM_BYTES // 256)):
        yield part
    yield finished()


async def test_what_has_come_does_not_come_again(
    client: Client, shard: FakeShard, proxy: CutProxy
) -> None:
    shard.script = save_much
    session_id = await client.submit(saving())
    await client.watch(session_id)
    backend = RemoteBackend(CONFIG)
    # More than what is on its way when the connection breaks, and lost with it.
    proxy.cut_after(NUM_BYTES * 3 // 4)
    (received,) = await asyncio.to_thread(lambda: list(backend.fetch(session_id, is_partial=False)))
    backend.close()
    assert received.node_id == 2
    assert NUM_BYTES < proxy.num_bytes < 1.5 * NUM_BYTES


async def test_more_than_there_is_can_not_have_come(client: Client, shard: FakeShard) -> None:
    session_id = await client.submit(saving())
    await client.watch(session_id)
    for place in ({"num_bytes_received": 5}, {"num_values_received": 1, "num_bytes_received": 1}):
        request = pb.FetchResultRequest(session_id=session_id, **place)
        with pytest.raises(NotFoundError) as caught:
            _ = [at async for at in client.stream("FetchResult", request)]
        assert caught.value.reason is Reason.RESULT_NOT_FOUND


@pytest.mark.parametrize("may_batch", [True, False])
async def test_small_values_come_together_for_who_knows_how(
    client: Client, shard: FakeShard, may_batch: bool
) -> None:
    async def save_often(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        for node_id in range(2, 102):
            for part in saved(node_id, bytes([node_id])):
                yield part
        yield finished()

    shard.script = save_often
    session_id = await client.submit(saving())
    await client.watch(session_id)
    request = pb.FetchResultRequest(session_id=session_id, may_batch=may_batch)
    responses = [at async for at in client.stream("FetchResult", request)]
    assert len(responses) == (2 if may_batch else 201)
    parts = [part for response in responses for part in apart(response)]
    assert [part.saved_value.node_id for part in parts[1::2]] == list(range(2, 102))
    assert b"".join(part.data for part in parts) == bytes(range(2, 102))


@pytest.mark.parametrize("max_bytes", [0, 20, 65536])
async def test_a_small_result_comes_with_the_last_event(
    client: Client, shard: FakeShard, max_bytes: int
) -> None:
    session_id = await client.submit(saving())
    request = pb.WatchSessionRequest(session_id=session_id, max_result_bytes=max_bytes)
    responses = [at async for at in client.stream("WatchSession", request)]
    fetched = [
        at
        async for at in client.stream(
            "FetchResult", pb.FetchResultRequest(session_id=session_id, may_batch=True)
        )
    ]
    assert not any(response.result for response in responses[:-1])
    # Its description counts, too.
    assert list(responses[-1].result) == (fetched if max_bytes > 20 else [])


async def test_a_small_result_is_not_fetched_again(
    client: Client, shard: FakeShard, proxy: CutProxy
) -> None:
    session_id = await client.submit(saving())
    await client.watch(session_id)
    backend = RemoteBackend(CONFIG)

    def results() -> list[int]:
        watch = backend.watch(session_id)
        assert watch.to_end() is None
        # No server could give it any more.
        backend.close()
        proxy.close()
        come = watch.result
        return [one.node_id for one in backend.fetch(session_id, is_partial=False, come=come)]

    assert await asyncio.to_thread(results) == [2]


async def save_a_little(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    """Saves a number, which is in the header alone, and a tensor."""
    yield trace_started(1)
    number = SavedValue(node_id=2, name="loss", value=Value(float_value=0.25))
    yield RunSegmentResponse(saved_value=sealed(number))
    for part in saved(4, b"abcdefgh"):
        yield part
    yield finished()


async def test_no_byte_that_is_stored_changes_unnoticed(
    client: Client, shard: FakeShard, config: SchedulerConfig, proxy: CutProxy
) -> None:
    shard.script = save_a_little
    session_id = await client.submit(saving())
    await client.watch(session_id)
    backend = RemoteBackend(CONFIG)

    def fetched() -> list[object]:
        return [received.value for received in backend.fetch(session_id, is_partial=False)]

    assert (await asyncio.to_thread(fetched))[0] == 0.25
    (path,) = config.data_dir.rglob("values.bin")
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(Error) as caught:
            await asyncio.to_thread(fetched)
        assert caught.value.reason is Reason.CHECKSUM_MISMATCH, place
    path.write_bytes(whole)
    assert len(await asyncio.to_thread(fetched)) == 2
    backend.close()

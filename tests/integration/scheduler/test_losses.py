"""Clients, shard groups and the server itself go away at bad moments."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_scheduler.server import Server
from insitu_wire.errors import Error, Reason
from support.fake_shard import FakeShard, saved, saving, trace_started

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
    from insitu_scheduler.config import SchedulerConfig

REPLICA_LOST = error_reason_pb2.ERROR_REASON_REPLICA_LOST


async def save_and_wait(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    """Saves a value and never ends."""
    yield trace_started(1)
    for response in saved(2, b"abc"):
        yield response
    await asyncio.Event().wait()


@pytest.fixture
async def impatient(config: SchedulerConfig) -> AsyncIterator[tuple[Client, FakeShard]]:
    """A client and a shard of a server that cancels orphans at once."""
    config = dataclasses.replace(config, orphan_grace_seconds=0.05)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        shard.script = save_and_wait
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Client(channel), shard


async def test_an_attached_session_is_cancelled_when_its_client_goes_away(
    impatient: tuple[Client, FakeShard],
) -> None:
    client, shard = impatient
    session_id = await client.submit(saving())
    await client.watch_until(session_id, "RUNNING")
    await _until(lambda: shard.released == [session_id])
    assert names(await client.watch(session_id))[-1] == "CANCELLED"
    assert shard.num_cancelled == 1


async def test_an_attached_session_that_nobody_ever_watches_is_cancelled(
    impatient: tuple[Client, FakeShard],
) -> None:
    client, shard = impatient
    session_id = await client.submit(saving())
    await _until(lambda: shard.released == [session_id])
    assert names(await client.watch(session_id))[-1] == "CANCELLED"


async def test_a_watched_session_outlives_the_grace_and_a_detached_one_needs_no_watcher(
    impatient: tuple[Client, FakeShard],
) -> None:
    client, shard = impatient
    detached = await client.submit(saving(), is_detached=True)
    watched = await client.submit(saving())
    watching = asyncio.create_task(client.watch(watched))
    await asyncio.sleep(0.2)
    state = await client.call("GetServerState", pb.GetServerStateRequest())
    assert [(queue.num_waiting, queue.num_running) for queue in state.queues] == [(1, 1)]
    await client.cancel(detached)
    await client.cancel(watched)
    await watching
    assert shard.released[0] == detached


async def test_a_group_that_dies_ends_its_session_and_keeps_what_was_saved(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        session_id = await client.submit(saving())
        await client.watch_until(session_id, "RUNNING")
    events = await client.watch(session_id)
    assert events[-1].failure.reason == REPLICA_LOST
    assert await client.fetch(session_id) == {2: b"abc"}
    assert list((await client.call("ListModels", pb.ListModelsRequest())).models) == []


async def test_a_registration_that_breaks_ends_the_groups_session(
    client: Client, shard: FakeShard
) -> None:
    shard.script = save_and_wait
    session_id = await client.submit(saving())
    await client.watch_until(session_id, "RUNNING")
    await shard.leave()
    assert (await client.watch(session_id))[-1].failure.reason == REPLICA_LOST
    await _until(lambda: shard.released == [session_id])


async def test_a_silent_group_loses_its_lease(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, lease_ttl_seconds=0.2)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            await asyncio.sleep(0.4)
            assert (await client.call("ListModels", pb.ListModelsRequest())).models
            shard.may_keep_alive.clear()
            async with asyncio.timeout(3):
                while (await client.call("ListModels", pb.ListModelsRequest())).models:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


async def test_a_waiting_session_is_taken_by_the_group_that_comes_next(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=save_and_wait) as lost:
        await lost.ready()
        running, waiting = await client.submit(saving()), await client.submit(saving())
        await client.watch_until(running, "RUNNING")
    async with FakeShard(server.address, group_id="group-2") as shard:
        await shard.ready()
        assert names(await client.watch(waiting))[-1] == "COMPLETED"
        assert shard.num_tokenizer_fetches == 0


async def test_a_group_that_registers_again_replaces_itself(
    client: Client, server: Server, shard: FakeShard
) -> None:
    async with FakeShard(server.address, group_id=shard.group_id) as again:
        await again.ready()
        state = await client.call("GetServerState", pb.GetServerStateRequest())
        assert [group.group.address for group in state.groups] == [again.address]
        assert names(await client.watch(await client.submit(saving())))[-1] == "COMPLETED"


async def test_a_server_that_stops_ends_its_sessions_and_says_so(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, grace_seconds=0.2)
    server = Server(config)
    await server.start()
    async with FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            ids = [await client.submit(saving()) for _ in range(2)]
            watching = [asyncio.create_task(client.watch(session_id)) for session_id in ids]
            await shard.running.wait()
            stopping = asyncio.create_task(server.stop())
            last = [(await events)[-1] for events in watching]
            await stopping
    assert [event.failure.reason for event in last] == [
        error_reason_pb2.ERROR_REASON_SHUTTING_DOWN
    ] * 2
    assert shard.released == [ids[0]]


async def test_a_server_that_stops_takes_nothing_new(config: SchedulerConfig) -> None:
    server = Server(dataclasses.replace(config, grace_seconds=5))
    await server.start()
    async with FakeShard(server.address) as shard:
        await shard.ready()
        shard.hold.clear()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            watching = asyncio.create_task(client.watch(await client.submit(saving())))
            await shard.running.wait()
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.05)
            with pytest.raises(Error) as caught:
                await client.submit(saving())
            assert caught.value.reason is Reason.SHUTTING_DOWN
            shard.hold.set()
            assert names(await watching)[-1] == "COMPLETED"
            await stopping


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - no event of the server tells it
            await asyncio.sleep(0.01)

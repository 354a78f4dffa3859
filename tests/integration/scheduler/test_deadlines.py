"""A session with a deadline has ended by then, wherever it is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1.error_reason_pb2 import ERROR_REASON_DEADLINE_EXCEEDED
from insitu_scheduler.server import Server
from insitu_wire.errors import InvalidTraceError
from insitu_wire.limits import CHANNEL_OPTIONS
from support.fake_shard import FakeShard, saving, trace_started

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from insitu_proto.v1.event_pb2 import Event
    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
    from insitu_scheduler.config import SchedulerConfig

SOON = 0.3
LATE = 3600.0


async def forever(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    yield trace_started(1)
    await asyncio.Event().wait()


def is_late(events: list[Event]) -> bool:
    return events[-1].failure.reason == ERROR_REASON_DEADLINE_EXCEEDED


async def test_one_that_waits_and_one_that_runs_end(client: Client, shard: FakeShard) -> None:
    shard.script = forever
    running = await client.submit(saving(), deadline=SOON)
    await shard.running.wait()
    waiting = await client.submit(saving(), deadline=SOON / 2)
    assert is_late(await client.watch(waiting))
    assert is_late(await client.watch(running))
    assert [request.session_id for request in shard.requests] == [running]
    assert shard.released == [running]


async def test_one_that_lost_its_group_ends_and_is_not_run_again(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=forever) as shard:
        await shard.ready()
        session_id = await client.submit(saving(), deadline=2 * SOON)
        await client.watch_until(session_id, "RUNNING")
    assert is_late(await client.watch(session_id))


async def test_it_outlives_the_scheduler(config: SchedulerConfig) -> None:
    async with Server(config) as server, FakeShard(server.address, script=forever) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
            session_id = await Client(channel).submit(saving(), is_detached=True, deadline=SOON)
    await asyncio.sleep(SOON)
    async with (
        Server(config) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        assert is_late(await Client(channel).watch(session_id))


async def test_one_that_ends_in_time_is_as_any_other(client: Client, shard: FakeShard) -> None:
    session_id = await client.submit(saving(), deadline=LATE)
    assert names(await client.watch(session_id))[-1] == "COMPLETED"


@pytest.mark.parametrize("deadline", [0.0, -1.0, 1e9])
async def test_what_is_no_deadline_is_refused(
    client: Client, shard: FakeShard, deadline: float
) -> None:
    with pytest.raises(InvalidTraceError, match="the deadline is"):
        await client.submit(saving(), deadline=deadline)

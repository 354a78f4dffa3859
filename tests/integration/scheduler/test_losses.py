"""Clients, shard groups and the server itself go away at bad moments."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.session_pb2 import Session
from insitu_proto.v1.shard_service_pb2 import RunSegmentResponse
from insitu_scheduler.server import Server
from insitu_wire.error_codec import to_failure
from insitu_wire.errors import Error, NotFoundError, Reason, error
from support.fake_shard import FakeShard, as_described, log, log_line, saved, saving, trace_started

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest
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
    async with asyncio.timeout(20):
        await shard.has_released.wait()
    assert shard.released[0] == detached


async def test_a_session_whose_group_dies_is_run_again_by_the_next(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        session_id = await client.submit(saving())
        await client.watch_until(session_id, "RUNNING")
        watching = asyncio.create_task(client.watch(session_id))
    assert list((await client.call("ListModels", pb.ListModelsRequest())).models) == []
    async with FakeShard(server.address, group_id="group-2") as next_shard:
        await next_shard.ready()
        events = await watching
    assert [event.attempt for event in events if names([event]) == ["QUEUED"]][-1] == 2
    assert any("was lost (its leader " in event.message for event in events)
    assert names(events)[-1] == "COMPLETED"
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert await client.fetch(session_id) == {2: bytes([2] * 4)}


async def test_what_was_saved_before_the_loss_is_there_until_the_next_attempt(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        session_id = await client.submit(saving())
        await client.watch_until(session_id, "RUNNING")
    async with asyncio.timeout(20):
        while not (found := await client.fetch(session_id, is_partial=True)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert found == {2: b"abc"}


async def test_messages_of_an_attempt_before_are_not_shown_again(
    client: Client, server: Server
) -> None:
    async def log_and_wait(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield log_line("one")
        yield log_line("two")
        await asyncio.Event().wait()

    session = Session(steps=[log("one"), log("two"), log("three")])
    async with FakeShard(server.address, script=log_and_wait) as shard:
        await shard.ready()
        session_id = await client.submit(session)
        async for event in client.events(session_id):
            if event.message == "two":
                break
    async with FakeShard(server.address, group_id="group-2") as shard:
        await shard.ready()
        events = await client.watch(session_id)
    messages = [event.message for event in events if names([event]) == ["LOG"]]
    assert messages == ["one", "two", "three"]


async def test_what_had_yielded_when_its_group_died_is_not_what_killed_it(
    client: Client, connect: Callable[[str], Client], server: Server
) -> None:
    may_go_on = asyncio.Event()

    async def long(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        started = trace_started(1)
        yield started
        if len(shard.requests) > 1:
            await asyncio.Event().wait()
        await may_go_on.wait()
        started.trace_started.execution_time.FromSeconds(40)
        yield started
        await asyncio.Event().wait()

    async with FakeShard(server.address, script=long) as shard:
        await shard.ready()
        yields = await client.submit(saving())
        await client.watch_until(yields, "RUNNING")
        kills = await connect("bob-key").submit(saving(), is_detached=True)
        may_go_on.set()
        await connect("bob-key").watch_until(kills, "RUNNING")
        assert await client.state(yields) == "QUEUED"
    await connect("bob-key").cancel(kills)
    async with FakeShard(
        server.address, group_id="group-2", script=save_and_wait, max_sessions=4
    ) as shard:
        await shard.ready()
        await _until(lambda: [request.session_id for request in shard.requests] == [yields])
        beside = await client.submit(saving())
        async with asyncio.timeout(20):
            await client.watch_until(beside, "RUNNING")


async def test_a_session_that_is_lost_each_time_is_given_up_and_takes_no_other_with_it(
    client: Client, server: Server
) -> None:
    async def die(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        running.add(request.session_id)
        if request.session_id == poison:
            dying.set()
        if request.session_id == poison or not number:
            await asyncio.Event().wait()
        running.remove(request.session_id)
        async for response in as_described(request):
            yield response

    poison, others = "", []
    for number in range(3):
        dying, running = asyncio.Event(), set[str]()
        async with FakeShard(
            server.address, group_id=f"group-{number}", script=die, max_sessions=4
        ) as shard:
            await shard.ready()
            if not poison:
                poison = await client.submit(saving())
                others = [await client.submit(saving()) for _ in range(2)]
                for session_id in others:
                    await client.watch_until(session_id, "RUNNING")
            async with asyncio.timeout(20):
                await dying.wait()
            assert number == 0 or running == {poison}
    async with asyncio.timeout(20):
        last = (await client.watch(poison))[-1]
        for session_id in others:
            assert names(await client.watch(session_id))[-1] == "COMPLETED"
    assert last.failure.reason == REPLICA_LOST
    assert "in each of 3 attempts (at last: its leader " in last.message


async def test_what_the_shard_says_of_its_loss_reaches_the_user_and_the_log(
    config: SchedulerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    # A group that lost a session gets the next when it has renewed its lease.
    config = dataclasses.replace(config, lease_ttl_seconds=4)
    why = "rank 1 was killed, as the system does where memory runs out"

    async def lose_a_rank(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        err = error(Reason.REPLICA_LOST, f"the group was lost: {why}", why=why)
        yield RunSegmentResponse(failure=to_failure(err))

    async with (
        Server(config) as server,
        FakeShard(server.address, script=lose_a_rank) as shard,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        client = Client(channel)
        await shard.ready()
        session_id = await client.submit(saving())
        async with asyncio.timeout(30):
            events = await client.watch(session_id)
    lost = [event.message for event in events if event.attempt]
    assert [why in message for message in lost] == [True, True]
    assert f"3 attempts (at last: {why})" in events[-1].message
    assert f"session {session_id} is lost: the group was lost: {why}" in caplog.text


async def test_a_session_that_is_cancelled_while_its_group_is_gone_does_not_run_again(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        session_id = await client.submit(saving())
        await client.watch_until(session_id, "RUNNING")
    await client.cancel(session_id)
    assert names(await client.watch(session_id))[-1] == "CANCELLED"


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


async def test_a_session_for_a_model_whose_group_has_just_died_waits_for_the_next(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address) as lost:
        await lost.ready()
    while (await client.call("ListModels", pb.ListModelsRequest())).models:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    waiting = await client.submit(saving())
    async with FakeShard(server.address, group_id="group-2") as shard:
        await shard.ready()
        assert names(await client.watch(waiting))[-1] == "COMPLETED"


async def test_a_group_that_registers_again_replaces_itself(
    client: Client, server: Server, shard: FakeShard
) -> None:
    async with FakeShard(server.address, group_id=shard.group_id) as again:
        await again.ready()
        state = await client.call("GetServerState", pb.GetServerStateRequest())
        assert [group.group.address for group in state.groups] == [again.address]
        assert names(await client.watch(await client.submit(saving())))[-1] == "COMPLETED"


async def test_a_server_that_stops_keeps_its_sessions_for_the_next(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, grace_seconds=0.2)
    async with Server(config) as server, FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            ids = [await client.submit(saving()) for _ in range(2)]
            watching = [asyncio.create_task(client.watch(session_id)) for session_id in ids]
            await shard.running.wait()
            await server.stop()
            for events in watching:
                with pytest.raises(Error) as caught:
                    await events
                assert caught.value.reason is Reason.SHUTTING_DOWN
    assert shard.released == [ids[0]]
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            for session_id in ids:
                events = await client.watch(session_id)
                assert names(events)[-1] == "COMPLETED"
                assert all(event.attempt <= 1 for event in events)
    assert [request.session_id for request in shard.requests] == ids


async def test_a_scheduler_that_takes_over_runs_what_waited_and_what_ran(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with Server(config) as server, FakeShard(server.address, script=save_and_wait) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            ids = [await client.submit(saving(), is_detached=True) for _ in range(3)]
            seen = await client.watch_until(ids[0], "RUNNING")
            # What a scheduler that is killed here leaves behind.
            left = dataclasses.replace(config, data_dir=tmp_path / "left")
            shutil.copytree(config.data_dir, left.data_dir)
    async with Server(left) as server, FakeShard(server.address) as shard:
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            assert [await client.state(session_id) for session_id in ids[1:]] == ["QUEUED"] * 2
            await shard.ready()
            for session_id in ids:
                assert names(await client.watch(session_id))[-1] == "COMPLETED"
            events = await client.watch(ids[0], after=len(seen))
    assert events[0].attempt == 2
    assert events[0].sequence == len(seen) + 1
    assert [request.session_id for request in shard.requests] == ids


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
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - no event of the server tells it
            await asyncio.sleep(0.01)


async def test_models_of_before_a_restart_are_awaited_and_others_are_not(
    config: SchedulerConfig,
) -> None:
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            await Client(channel).submit(saving(), is_detached=True)
    async with (
        Server(config) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        client = Client(channel)
        with pytest.raises(NotFoundError, match="is back yet") as awaited:
            await client.submit(saving())
        assert awaited.value.retry_after_seconds
        with pytest.raises(NotFoundError) as unknown:
            await client.call("GetModel", pb.GetModelRequest(name="another"))
        assert unknown.value.retry_after_seconds is None
        async with FakeShard(server.address) as shard:
            await shard.ready()
            session_id = await client.submit(saving())
            assert names(await client.watch(session_id))[-1] == "COMPLETED"

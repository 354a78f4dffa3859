"""Shard groups that take several sessions at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.intervention_pb2 import Keep, Load, Node
from insitu_proto.v1.placement_pb2 import ShardGroupState
from insitu_proto.v1.session_pb2 import Session
from insitu_proto.v1.shard_service_pb2 import RunSegmentResponse
from insitu_scheduler.server import Server
from support.fake_shard import (
    MODEL,
    FakeShard,
    finished,
    read,
    reference,
    save,
    saved,
    saving,
    trace,
    trace_started,
)

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest
    from insitu_scheduler.config import SchedulerConfig


class Directed:
    """A script whose sessions end when they are told to."""

    def __init__(self) -> None:
        self.may_end: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.failing: set[str] = set()

    async def __call__(self, request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        await self.may_end[request.session_id].wait()
        if request.session_id in self.failing:
            failure = error_reason_pb2.Failure(
                reason=error_reason_pb2.ERROR_REASON_SHAPE_MISMATCH, message="2 is not 3"
            )
            yield RunSegmentResponse(failure=failure)
            return
        for response in saved(2, b"abc"):
            yield response
        yield finished()


@pytest.fixture
def script() -> Directed:
    return Directed()


@pytest.fixture
async def wide(server: Server, script: Directed) -> AsyncIterator[FakeShard]:
    """A group of three places."""
    async with FakeShard(server.address, script=script, max_sessions=3) as shard:
        yield await shard.ready()


async def _submit(client: Client, count: int) -> list[str]:
    return [await client.submit(saving()) for _ in range(count)]


async def _run(client: Client, count: int) -> list[str]:
    ids = await _submit(client, count)
    for session_id in ids:
        await client.watch_until(session_id, "RUNNING")
    return ids


async def _group_states(client: Client) -> dict[str, str]:
    state = await client.call("GetServerState", pb.GetServerStateRequest())
    return {
        entry.group.model: ShardGroupState.Name(entry.state).split("_")[-1]
        for entry in state.groups
    }


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - no event of the server tells it
            await asyncio.sleep(0.01)


async def test_a_group_runs_as_many_sessions_as_it_takes_and_the_others_wait_in_order(
    client: Client, wide: FakeShard, script: Directed
) -> None:
    first, second = await _run(client, 2)
    assert await _group_states(client) == {MODEL: "READY"}
    (third,) = await _run(client, 1)
    assert await _group_states(client) == {MODEL: "BUSY"}
    waiting = await _submit(client, 3)
    assert [await client.state(one) for one in waiting] == ["QUEUED"] * 3
    state = await client.call("GetServerState", pb.GetServerStateRequest())
    assert [(queue.num_waiting, queue.num_running) for queue in state.queues] == [(3, 3)]
    assert [group.group.max_sessions for group in state.groups] == [3]
    positions = [(await client.watch_until(one, "QUEUED"))[-1].queue_position for one in waiting]
    assert positions == [1, 2, 3]
    script.may_end[second].set()
    assert names(await client.watch(second))[-1] == "COMPLETED"
    await client.watch_until(waiting[0], "RUNNING")
    assert [await client.state(one) for one in (first, third)] == ["RUNNING"] * 2
    assert [await client.state(one) for one in waiting[1:]] == ["QUEUED"] * 2
    for one in (first, third, *waiting):
        script.may_end[one].set()
        assert names(await client.watch(one))[-1] == "COMPLETED"
    assert [request.session_id for request in wide.requests] == [first, second, third, *waiting]


async def test_one_that_fails_and_one_that_is_cancelled_leave_the_others_alone(
    client: Client, wide: FakeShard, script: Directed
) -> None:
    failing, cancelled, good = await _run(client, 3)
    script.failing.add(failing)
    script.may_end[failing].set()
    assert (await client.watch(failing))[-1].failure.message == "2 is not 3"
    await client.cancel(cancelled)
    assert names(await client.watch(cancelled))[-1] == "CANCELLED"
    assert await client.state(good) == "RUNNING"
    script.may_end[good].set()
    assert names(await client.watch(good))[-1] == "COMPLETED"
    assert await client.fetch(good) == {2: b"abc"}
    assert wide.num_cancelled == 1
    await _until(lambda: set(wide.released) == {failing, cancelled, good})


async def test_all_sessions_of_a_group_that_is_lost_wait_again(
    client: Client, wide: FakeShard
) -> None:
    ids = await _run(client, 3)
    (waiting,) = await _submit(client, 1)
    await wide.leave()
    await _until(lambda: set(wide.released) == set(ids))
    for session_id in ids:
        events = await client.watch_until(session_id, "RUNNING")
        await anext(client.events(session_id, after=len(events)))
        assert await client.state(session_id) == "QUEUED"
    assert await client.state(waiting) == "QUEUED"


async def test_a_group_that_does_not_tell_takes_one_session(
    client: Client, server: Server, script: Directed
) -> None:
    async with FakeShard(server.address, script=script, max_sessions=0) as shard:
        await shard.ready()
        (running,) = await _run(client, 1)
        (waiting,) = await _submit(client, 1)
        assert await client.state(waiting) == "QUEUED"
        for session_id in (running, waiting):
            script.may_end[session_id].set()
            assert names(await client.watch(session_id))[-1] == "COMPLETED"


async def test_sessions_are_spread_over_the_groups_of_a_model(
    client: Client, server: Server, wide: FakeShard, script: Directed
) -> None:
    async with FakeShard(
        server.address, script=script, group_id="group-2", max_sessions=3
    ) as second:
        await second.ready()
        await _run(client, 4)
        assert [len(group.requests) for group in (wide, second)] == [2, 2]


async def test_a_session_over_two_models_has_a_place_only_where_it_runs(
    client: Client, server: Server, script: Directed
) -> None:
    def group(name: str, max_sessions: int) -> FakeShard:
        return FakeShard(
            server.address, model=name, script=script, group_id=name, max_sessions=max_sessions
        )

    async with group("tiny/a", 1) as a, group("tiny/b", 2) as b:
        for shard in (a, b):
            await shard.ready()
        both = await client.submit(
            Session(
                steps=[
                    trace(read(1), save(2, of=1), model="tiny/a"),
                    trace(read(3), save(4, of=3), model="tiny/b"),
                ]
            )
        )
        await client.watch_until(both, "RUNNING")
        assert await _group_states(client) == {"tiny/a": "BUSY", "tiny/b": "READY"}
        alone = await client.submit(Session(steps=[trace(read(1), save(2, of=1), model="tiny/b")]))
        await client.watch_until(alone, "RUNNING")
        narrow = await client.submit(Session(steps=[trace(read(1), save(2, of=1), model="tiny/a")]))
        assert await client.state(narrow) == "QUEUED"
        script.may_end[both].set()
        await _until(lambda: [request.session_id for request in b.requests] == [alone, both])
        await client.watch_until(narrow, "RUNNING")
        script.may_end[narrow].set()
        await client.watch(narrow)
        assert names(await client.watch(both))[-1] == "COMPLETED"
        await _until(lambda: both in a.released and both in b.released)
        assert await client.state(alone) == "RUNNING"
        async with asyncio.timeout(20):
            while "BUSY" in (await _group_states(client)).values():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)


async def test_a_session_waits_for_the_one_that_keeps_what_it_loads(
    client: Client, wide: FakeShard, script: Directed
) -> None:
    kept = Node(id=2, keep=Keep(value=reference(1), handle_id="h" * 32))
    keeping = await client.submit(Session(steps=[trace(read(1), kept)]))
    await client.watch_until(keeping, "RUNNING")
    loaded = Node(id=1, load=Load(handle_id="h" * 32))
    loading = await client.submit(Session(steps=[trace(loaded, save(2, of=1))]))
    other = await client.submit(saving())
    await client.watch_until(other, "RUNNING")
    assert await client.state(loading) == "QUEUED"
    script.may_end[keeping].set()
    await client.watch_until(loading, "RUNNING")
    assert await client.state(other) == "RUNNING"


async def test_one_users_flood_leaves_room_for_the_next_user(
    client: Client, server: Server, script: Directed, connect: Callable[[str], Client]
) -> None:
    async with FakeShard(server.address, script=script, max_sessions=4) as shard:
        await shard.ready()
        flood = await _submit(client, 20)
        for session_id in flood[:3]:
            await client.watch_until(session_id, "RUNNING")
        assert await client.state(flood[3]) == "QUEUED"
        bob, cy = connect("bob-key"), connect("cy-key")
        first = await bob.submit(saving())
        await bob.watch_until(first, "RUNNING")
        # All places are taken: the next user is before all of the flood that waits.
        second = await cy.submit(saving())
        assert (await cy.watch_until(second, "QUEUED"))[-1].queue_position <= 2
        script.may_end[flood[0]].set()
        await cy.watch_until(second, "RUNNING")
        assert await client.state(flood[3]) == "QUEUED"


async def test_a_session_comes_in_on_its_next_model_whoever_is_there(
    client: Client, server: Server, script: Directed, connect: Callable[[str], Client]
) -> None:
    async with (
        FakeShard(server.address, model="tiny/a", script=script, group_id="a") as a,
        FakeShard(server.address, model="tiny/b", script=script, group_id="b") as b,
    ):
        for shard in (a, b):
            await shard.ready()
        bob = connect("bob-key")
        busy = await bob.submit(Session(steps=[trace(read(1), save(2, of=1), model="tiny/b")]))
        await bob.watch_until(busy, "RUNNING")
        waits = await bob.submit(Session(steps=[trace(read(1), save(2, of=1), model="tiny/b")]))
        steps = [trace(read(at), save(at + 1, of=at), model=f"tiny/{name}") for at, name in
                 ((1, "a"), (3, "b"))]  # fmt: skip
        both = await client.submit(Session(steps=steps))
        script.may_end[both].set()
        assert names(await client.watch(both))[-1] == "COMPLETED"
        assert await bob.state(waits) == "QUEUED"


async def test_a_session_beyond_its_quantum_yields_while_others_wait_and_goes_on_in_its_turn(
    config: SchedulerConfig,
) -> None:
    may_go_on = asyncio.Event()

    async def long(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        if len(shard.requests) > 1:
            yield finished()
            return
        for number in (1, 2):
            started = trace_started(number)
            started.trace_started.execution_time.FromSeconds(40 * (number - 1))
            yield started
            await may_go_on.wait()
        await _until(lambda: [is_held for _, is_held in shard.pauses] == [True, False])
        yield finished()

    async with Server(config) as server, FakeShard(server.address, script=long) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            ann, bob = Client(channel, "ann-key"), Client(channel, "bob-key")
            session_id = await ann.submit(saving())
            await ann.watch_until(session_id, "RUNNING")
            short = await bob.submit(saving())
            assert await bob.state(short) == "QUEUED"
            may_go_on.set()
            assert names(await bob.watch(short))[-1] == "COMPLETED"
            events = await ann.watch(session_id)
    assert names(events)[-1] == "COMPLETED"
    (yielded,) = [event for event in events if "keeps its values" in event.message]
    after = names(events[yielded.sequence :])
    assert "30 s" in yielded.message
    assert after[0] == "RUNNING"
    assert [request.session_id for request in shard.requests] == [session_id, short]
    assert all(event.attempt <= 1 for event in events)


async def test_a_session_beyond_its_quantum_goes_on_while_only_its_users_own_wait(
    client: Client, server: Server
) -> None:
    may_go_on = asyncio.Event()

    async def long(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        started = trace_started(1)
        started.trace_started.execution_time.FromSeconds(40)
        await may_go_on.wait()
        yield started
        yield finished()

    async with FakeShard(server.address, script=long) as shard:
        await shard.ready()
        ids = await _submit(client, 2)
        may_go_on.set()
        for session_id in ids:
            assert names(await client.watch(session_id))[-1] == "COMPLETED"
        assert shard.pauses == []

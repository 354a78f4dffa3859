"""Sessions through a real server: from submission to result."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2, event_pb2
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.event_pb2 import EventKind
from insitu_proto.v1.session_pb2 import Exit, Session, Step
from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
from insitu_scheduler.server import Server
from insitu_wire.errors import Error, Reason
from insitu_wire.limits import CHUNK_BYTES
from support.fake_shard import (
    MODEL,
    FakeShard,
    describe,
    finished,
    log,
    log_line,
    read,
    save,
    saved,
    saving,
    trace,
    trace_started,
)

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from insitu_scheduler.config import SchedulerConfig


async def forever(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    """Starts the first trace and never ends it."""
    yield trace_started(1)
    await asyncio.Event().wait()


async def test_a_session_goes_through_its_events_in_order_and_gives_its_values(
    client: Client, shard: FakeShard
) -> None:
    session_id = await client.submit(Session(steps=[*saving(1).steps, *saving(3).steps]))
    events = await client.watch(session_id)
    assert names(events) == ["RECEIVED", "APPROVED", "QUEUED", "RUNNING", "COMPLETED"]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert events[2].queue_position == 1
    assert (events[3].trace_number, events[3].num_traces) == (1, 2)
    assert await client.fetch(session_id) == {2: b"\2" * 4, 4: b"\4" * 4}
    assert await client.fetch(session_id, 4) == {4: b"\4" * 4}
    assert shard.released == [session_id]
    assert shard.requests[0].segment.first_trace_number == 1


async def test_a_session_of_log_and_exit_alone_runs_on_any_group(
    client: Client, shard: FakeShard
) -> None:
    session_id = await client.submit(Session(steps=[log("-- Early Stop --"), Step(exit=Exit())]))
    events = await client.watch(session_id)
    assert names(events)[3:] == ["RUNNING", "LOG", "COMPLETED"]
    assert [event.message for event in events][3:5] == [
        "Your session is running.",
        "-- Early Stop --",
    ]
    assert await client.fetch(session_id) == {}


async def test_a_broken_stream_is_resumed_after_the_last_event_seen(
    client: Client, shard: FakeShard
) -> None:
    session_id = await client.submit(saving())
    seen = await client.watch_until(session_id, "APPROVED")
    rest = await client.watch(session_id, after=seen[-1].sequence)
    assert names(seen + rest) == ["RECEIVED", "APPROVED", "QUEUED", "RUNNING", "COMPLETED"]


async def test_a_session_submitted_twice_runs_once(client: Client, shard: FakeShard) -> None:
    both = await asyncio.gather(*(client.submit(saving(), request_id="r") for _ in range(2)))
    await client.watch(both[0])
    assert [await client.submit(saving(), request_id="r"), both[1]] == [both[0]] * 2
    assert len(shard.requests) == 1


async def test_a_request_id_can_not_be_used_for_another_session(
    client: Client, shard: FakeShard
) -> None:
    first = await client.submit(saving(), request_id="r")
    with pytest.raises(Error, match=first) as caught:
        await client.submit(saving(5), request_id="r")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


async def test_sessions_wait_their_turn_and_are_told_their_position(
    client: Client, shard: FakeShard
) -> None:
    shard.script = forever
    running, *waiting = [await client.submit(saving()) for _ in range(4)]
    await shard.running.wait()
    positions = [(await client.watch_until(one, "QUEUED"))[-1].queue_position for one in waiting]
    assert positions == [1, 2, 3]
    await client.cancel(waiting[0])
    moved = [event async for event in _next_events(client, waiting[2], after=3, count=1)]
    assert (names(moved), moved[0].queue_position) == (["QUEUED"], 2)
    await client.cancel(running)


async def _next_events(
    client: Client, session_id: str, *, after: int, count: int
) -> AsyncIterator[event_pb2.Event]:
    async for event in client.events(session_id, after):
        yield event
        count -= 1
        if not count:
            return


async def test_a_freed_group_takes_the_next_session(client: Client, shard: FakeShard) -> None:
    ids = [await client.submit(saving()) for _ in range(5)]
    await asyncio.gather(*(client.watch(session_id) for session_id in ids))
    assert [request.session_id for request in shard.requests] == ids


async def test_a_session_that_waits_is_cancelled_at_once(client: Client, shard: FakeShard) -> None:
    shard.script = forever
    running, waiting = await client.submit(saving()), await client.submit(saving())
    assert await client.cancel(waiting) is False
    assert names(await client.watch(waiting))[-2:] == ["QUEUED", "CANCELLED"]
    assert await client.cancel(waiting) is True
    await client.cancel(running)
    assert [request.session_id for request in shard.requests] == [running]


async def test_a_session_that_runs_is_cancelled_on_its_shard(
    client: Client, shard: FakeShard
) -> None:
    shard.script = forever
    session_id = await client.submit(saving())
    await client.watch_until(session_id, "RUNNING")
    assert await client.cancel(session_id) is False
    assert names(await client.watch(session_id))[-1] == "CANCELLED"
    assert (shard.num_cancelled, shard.released) == (1, [session_id])


async def test_a_failure_ends_the_session_and_keeps_what_was_saved_before(
    client: Client, shard: FakeShard
) -> None:
    failure = error_reason_pb2.Failure(
        reason=error_reason_pb2.ERROR_REASON_SHAPE_MISMATCH, message="2 is not 3", trace_number=2
    )

    async def fail(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        for response in saved(2, b"abc"):
            yield response
        yield RunSegmentResponse(failure=failure)

    shard.script = fail
    session_id = await client.submit(saving())
    last = (await client.watch(session_id))[-1]
    assert (last.message, last.failure) == ("2 is not 3", failure)
    assert await client.fetch(session_id) == {2: b"abc"}
    assert shard.released == [session_id]


async def test_large_values_come_back_in_chunks(client: Client, shard: FakeShard) -> None:
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"tail"

    async def save_large(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        for response in saved(2, data):
            yield response
        yield finished()

    shard.script = save_large
    session_id = await client.submit(saving())
    await client.watch(session_id)
    request = pb.FetchResultRequest(session_id=session_id)
    responses = [part async for part in client.stream("FetchResult", request)]
    assert (responses[0].summary.num_values, responses[0].summary.num_bytes) == (1, len(data))
    assert [len(part.data) for part in responses[2:]] == [CHUNK_BYTES] * 3 + [4]
    assert b"".join(part.data for part in responses[2:]) == data


async def test_a_value_that_was_damaged_on_its_way_ends_the_session(
    client: Client, shard: FakeShard
) -> None:
    async def damage(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        for response in saved(2, b"abc", crc32=1):
            yield response
        yield finished()

    shard.script = damage
    session_id = await client.submit(saving())
    last = (await client.watch(session_id))[-1]
    assert last.failure.reason == error_reason_pb2.ERROR_REASON_CHECKSUM_MISMATCH
    with pytest.raises(Error) as caught:
        await client.fetch(session_id)
    assert caught.value.reason is Reason.RESULT_NOT_FOUND


async def test_a_result_is_not_there_before_the_end_nor_for_other_nodes(
    client: Client, shard: FakeShard
) -> None:
    shard.script = forever
    session_id = await client.submit(saving())
    with pytest.raises(Error, match="has not ended"):
        await client.fetch(session_id)
    await client.cancel(session_id)
    await client.watch(session_id)
    with pytest.raises(Error, match="node 9") as caught:
        await client.fetch(session_id, 9)
    assert caught.value.reason is Reason.RESULT_NOT_FOUND


async def test_a_partial_result_has_what_finished_traces_saved(
    client: Client, shard: FakeShard
) -> None:
    go_on = asyncio.Event()

    async def save_twice(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield trace_started(1)
        for response in saved(2, b"abc"):
            yield response
        yield trace_started(2)
        yield saved(4, b"half")[0]
        await go_on.wait()
        yield saved(4, b"half")[1]
        yield finished()

    shard.script = save_twice
    session_id = await client.submit(saving())
    assert (await client.state(session_id)) in ("QUEUED", "RUNNING")
    async with asyncio.timeout(20):
        while not (found := await client.fetch(session_id, is_partial=True)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert found == {2: b"abc"}
    await client.watch_until(session_id, "RUNNING")
    go_on.set()
    await client.watch(session_id)
    assert await client.fetch(session_id) == {2: b"abc", 4: b"half"}


async def test_a_partial_result_may_be_empty(client: Client, shard: FakeShard) -> None:
    shard.script = forever
    session_id = await client.submit(saving())
    assert await client.fetch(session_id, is_partial=True) == {}
    await client.cancel(session_id)
    await client.watch(session_id)
    assert await client.fetch(session_id, is_partial=True) == {}


async def test_a_sessions_state_is_told_without_waiting(client: Client, shard: FakeShard) -> None:
    shard.hold.clear()
    running, waiting = await client.submit(saving()), await client.submit(saving())
    await shard.running.wait()
    assert await client.state(waiting) == "QUEUED"
    shard.hold.set()
    await client.watch(waiting)
    assert [await client.state(one) for one in (running, waiting)] == ["COMPLETED"] * 2


async def test_what_a_session_prints_is_not_its_state(client: Client, shard: FakeShard) -> None:
    async def print_and_wait(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        yield log_line("hello")
        await asyncio.Event().wait()

    shard.script = print_and_wait
    session_id = await client.submit(saving())
    await client.watch_until(session_id, "LOG")
    assert await client.state(session_id) == "RUNNING"
    await client.cancel(session_id)


async def test_later_traces_are_announced_at_most_once_a_second(
    client: Client, shard: FakeShard
) -> None:
    async def many(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        for number in range(1, 50):
            yield trace_started(number)
        yield log_line("done")
        yield finished()

    shard.script = many
    events = await client.watch(await client.submit(saving()))
    assert names(events)[3:] == ["RUNNING", "LOG", "COMPLETED"]


async def test_the_journal_shows_how_a_session_ended(
    client: Client, shard: FakeShard, tmp_path: Path
) -> None:
    session_id = await client.submit(saving())
    await client.watch(session_id)
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    try:
        query = "select id, model, state, finished_at is null from sessions"
        assert connection.execute(query).fetchall() == [(session_id, MODEL, "COMPLETED", 0)]
        query = "select kind from events order by sequence"
        stored = [kind for (kind,) in connection.execute(query)]
    finally:
        connection.close()
    assert stored == ["RECEIVED", "APPROVED", "QUEUED", "RUNNING", "COMPLETED"]


async def test_events_and_results_outlive_a_restart(config: SchedulerConfig) -> None:
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            session_id = await Client(channel).submit(saving())
            before = await Client(channel).watch(session_id)
    async with Server(config) as server, grpc.aio.insecure_channel(server.address) as channel:
        assert await Client(channel).watch(session_id) == before
        assert await Client(channel).fetch(session_id) == {2: b"\2" * 4}


async def test_models_are_described_with_their_tokenizer(client: Client, shard: FakeShard) -> None:
    models = (await client.call("ListModels", pb.ListModelsRequest())).models
    assert [(model.name, model.num_replicas) for model in models] == [(MODEL, 1)]
    response = await client.call("GetModel", pb.GetModelRequest(name=MODEL))
    assert response.description == describe()
    request = pb.DownloadTokenizerRequest(name=MODEL)
    parts = [part async for part in client.stream("DownloadTokenizer", request)]
    assert [(part.file_name, part.data) for part in parts] == [
        ("tokenizer.json", b"{}"),
        ("empty.txt", b""),
    ]
    with pytest.raises(Error, match=MODEL) as caught:
        await client.call("GetModel", pb.GetModelRequest(name="gpt-9"))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_the_server_tells_its_groups_and_queues(client: Client, shard: FakeShard) -> None:
    shard.script = forever
    ids = [await client.submit(saving()) for _ in range(3)]
    await shard.running.wait()
    state = await client.call("GetServerState", pb.GetServerStateRequest())
    assert [(queue.num_waiting, queue.num_running) for queue in state.queues] == [(2, 1)]
    assert [group.group.address for group in state.groups] == [shard.address]
    assert state.max_session_bytes > 0
    for session_id in ids:
        await client.cancel(session_id)


async def test_the_server_adds_little_time_to_a_session(client: Client, shard: FakeShard) -> None:
    session = Session(steps=[trace(read(1), save(2, of=1))])
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        session_id = await client.submit(session)
        await client.watch(session_id)
        await client.fetch(session_id)
        seconds.append(time.perf_counter() - started)
    # Generous, for busy machines; the benchmark measures it properly.
    assert min(seconds) < 0.05


async def test_a_user_lists_own_sessions_page_by_page(
    client: Client, shard: FakeShard, connect: Callable[[str], Client]
) -> None:
    ids = [await client.submit(saving()) for _ in range(3)]
    for session_id in ids:
        await client.watch(session_id)
    await connect("bob-key").submit(saving(), is_detached=True)
    first = await client.call("ListSessions", pb.ListSessionsRequest(page_size=2))
    token = first.next_page_token
    second = await client.call(
        "ListSessions", pb.ListSessionsRequest(page_size=2, page_token=token)
    )
    listed = [*first.sessions, *second.sessions]
    assert [found.session_id for found in listed] == ids[::-1]
    assert second.next_page_token == ""
    assert {EventKind.Name(found.state) for found in listed} == {"EVENT_KIND_COMPLETED"}
    assert all(found.created_at.ToDatetime() <= found.finished_at.ToDatetime() for found in listed)
    assert {found.model for found in listed} == {MODEL}


async def test_a_session_that_ended_long_ago_is_forgotten(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, retention_seconds=0.4)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            session_id = await client.submit(saving())
            assert names(await client.watch(session_id))[-1] == "COMPLETED"
            async with asyncio.timeout(20):
                while (await client.call("ListSessions", pb.ListSessionsRequest())).sessions:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                while any(config.data_dir.glob("results/*")):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            with pytest.raises(Error) as caught:
                await client.fetch(session_id)
            assert caught.value.reason is Reason.SESSION_NOT_FOUND

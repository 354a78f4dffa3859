"""What API keys allow, on a real server: roles, models, limits, tiers, changes while it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.session_pb2 import Loop, Session, Step
from insitu_proto.v1.value_pb2 import ListValue, Value
from insitu_scheduler.keys import Key, new_key, write_keys
from insitu_scheduler.limits import Limits
from insitu_scheduler.server import Server
from insitu_scheduler.terms import Tier
from insitu_wire.errors import AuthenticationError, Error, Reason
from insitu_wire.limits import CHANNEL_OPTIONS
from support.fake_shard import (
    MODEL,
    FakeShard,
    finished,
    read,
    save,
    saved,
    saving,
    trace,
    trace_started,
)

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
    from insitu_scheduler.config import SchedulerConfig


@dataclass
class Lab:
    """A server with a key file, its group, and clients by user."""

    server: Server
    shard: FakeShard
    clients: dict[str, Client]


@asynccontextmanager
async def lab(
    config: SchedulerConfig, folder: Path, **allowed: dict[str, Any]
) -> AsyncIterator[Lab]:
    texts, keys = zip(*(new_key(user, **what) for user, what in allowed.items()), strict=True)
    write_keys(folder / "keys", list(keys))
    config = dataclasses.replace(config, api_keys_file=folder / "keys")
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
            named = zip(allowed, texts, strict=True)
            yield Lab(server, shard, {user: Client(channel, text) for user, text in named})


async def refusal(awaited: Any) -> Error:
    with pytest.raises(Error) as caught:
        await awaited
    return caught.value


async def test_a_model_that_the_key_is_not_for_is_refused_before_the_queue_and_not_shown(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={}, bob={"models": ("lab/*",)}) as at:
        bob = at.clients["bob"]
        inner = Step(loop=Loop(items=Value(list=ListValue()), item_node_id=1, steps=[trace()]))
        for session in (saving(), Session(steps=[inner])):
            err = await refusal(bob.submit(session))
            assert err.reason is Reason.PERMISSION_DENIED
            assert MODEL in err.message
        for method in ("GetModel", "DownloadTokenizer"):
            request = getattr(pb, f"{method}Request")(name=MODEL)
            with pytest.raises(Error) as caught:
                if method == "GetModel":
                    await bob.call(method, request)
                else:
                    _ = [part async for part in bob.stream(method, request)]
            assert caught.value.reason is Reason.PERMISSION_DENIED
        state = await bob.call("GetServerState", pb.GetServerStateRequest())
        assert not state.groups
        assert not state.queues
        assert not (await bob.call("ListModels", pb.ListModelsRequest())).models
        missing = await refusal(bob.submit(Session(steps=[trace(model="lab/none")])))
        assert missing.reason is Reason.MODEL_NOT_FOUND
        assert MODEL not in missing.message
        assert not at.shard.requests
        assert names(await at.clients["ann"].watch(await at.clients["ann"].submit(saving())))


async def test_what_is_for_administrators_is_refused_to_others(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={}, root={"role": "admin"}) as at:
        ann, root = at.clients["ann"], at.clients["root"]
        at.shard.hold.clear()
        session_id = await ann.submit(saving(), is_detached=True)
        for method, request in (
            ("Drain", pb.DrainRequest()),
            ("ListSessions", pb.ListSessionsRequest(all_users=True)),
        ):
            err = await refusal(ann.call(method, request))
            assert err.reason is Reason.PERMISSION_DENIED
            assert "administrators" in err.message
        listed = await root.call("ListSessions", pb.ListSessionsRequest(all_users=True))
        assert [(row.session_id, row.user) for row in listed.sessions] == [(session_id, "ann")]
        err = await refusal(root.state(session_id))
        assert err.reason is Reason.PERMISSION_DENIED, "administrators cancel, and do not read"
        await root.cancel(session_id)
        assert names(await ann.watch(session_id))[-1] == "CANCELLED"


async def test_a_server_that_drains_takes_nothing_new_ends_what_it_has_and_takes_again(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={}, root={"role": "admin"}) as at:
        ann, root = at.clients["ann"], at.clients["root"]
        at.shard.hold.clear()
        session_id = await ann.submit(saving())
        await root.call("Drain", pb.DrainRequest())
        err = await refusal(ann.submit(saving()))
        assert err.reason is Reason.SHUTTING_DOWN
        assert (await ann.call("GetServerState", pb.GetServerStateRequest())).is_draining
        at.shard.hold.set()
        assert names(await ann.watch(session_id))[-1] == "COMPLETED"
        await root.call("Drain", pb.DrainRequest(undo=True))
        await ann.watch(await ann.submit(saving()))


async def test_a_group_that_drains_is_sent_nothing_new(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, root={"role": "admin"}) as at:
        root = at.clients["root"]
        answer = await root.call("Drain", pb.DrainRequest(group_ids=["group"]))
        assert list(answer.group_ids) == ["group-1"]
        session_id = await root.submit(saving())
        async with FakeShard(at.server.address, group_id="other") as other:
            await other.ready()
            await root.watch(session_id)
            assert not at.shard.requests
            assert len(other.requests) == 1
        err = await refusal(root.call("Drain", pb.DrainRequest(group_ids=["nope"])))
        assert "0 shard groups" in err.message


async def test_a_user_has_no_more_sessions_waiting_than_the_key_allows(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    limits = {"limits": Limits(max_waiting_sessions=2)}
    async with lab(config, tmp_path, ann=limits, bob={}) as at:
        ann, bob = at.clients["ann"], at.clients["bob"]
        at.shard.hold.clear()
        ids = [await ann.submit(saving())]
        await ann.watch_until(ids[0], "QUEUED")
        async with asyncio.timeout(20):
            await at.shard.running.wait()
        ids += [await ann.submit(saving()) for _ in range(2)]
        err = await refusal(ann.submit(saving()))
        assert err.reason is Reason.QUOTA_EXCEEDED
        assert err.retry_after_seconds
        await bob.submit(saving())
        await ann.cancel(ids[1])
        await ann.submit(saving())
        at.shard.hold.set()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(max_tokens=2), Reason.REQUEST_TOO_LARGE),
        (Limits(max_request_bytes=40), Reason.REQUEST_TOO_LARGE),
    ],
)
async def test_a_session_over_what_the_key_allows_is_refused(
    config: SchedulerConfig, tmp_path: Path, limits: Limits, reason: Reason
) -> None:
    async with lab(config, tmp_path, ann={"limits": limits}) as at:
        assert (await refusal(at.clients["ann"].submit(saving()))).reason is reason
        assert not at.shard.requests


async def _saves_much(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    for response in [*saved(2, b"1234"), *saved(4, bytes(100))]:
        yield response
    yield finished()


async def test_a_session_that_saves_too_much_fails_and_keeps_what_it_saved_before(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={"limits": Limits(max_saved_bytes=50)}) as at:
        at.shard.script = _saves_much
        ann = at.clients["ann"]
        nodes = (read(1), save(2, of=1), read(3), save(4, of=3))
        session_id = await ann.submit(Session(steps=[trace(*nodes)]))
        last = (await ann.watch(session_id))[-1]
        assert "may take at most 50" in last.failure.message
        assert await ann.fetch(session_id, is_partial=True) == {2: b"1234"}


async def _computes_prompts(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    for number in (1, 2):
        yield trace_started(number, num_tokens=40)
        for response in saved(2 * number, b"1234"):
            yield response
    yield finished()


async def test_tokens_that_nobody_could_count_before_end_the_session_that_has_too_many(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={"limits": Limits(max_tokens=50)}) as at:
        at.shard.script = _computes_prompts
        ann = at.clients["ann"]
        steps = [trace(read(first), save(first + 1, of=first)) for first in (1, 3)]
        session_id = await ann.submit(Session(steps=steps))
        last = (await ann.watch(session_id))[-1]
        assert "takes 80 tokens or more" in last.failure.message
        assert await ann.fetch(session_id, is_partial=True) == {2: b"1234"}


async def test_a_session_that_runs_for_too_long_fails_and_its_group_takes_the_next(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={"limits": Limits(max_run_seconds=0.2)}) as at:
        ann = at.clients["ann"]
        at.shard.hold.clear()
        last = (await ann.watch(await ann.submit(saving())))[-1]
        assert "ran for longer than 0.2 seconds" in last.failure.message
        assert at.shard.num_cancelled == 1
        at.shard.hold.set()
        assert names(await ann.watch(await ann.submit(saving())))[-1] == "COMPLETED"


async def test_the_smaller_of_the_servers_and_the_keys_bounds_reaches_the_shard(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, limits=Limits(max_handle_bytes=10, max_kept_bytes=10))
    async with lab(config, tmp_path, ann={"limits": Limits(max_kept_bytes=5)}) as at:
        ann = at.clients["ann"]
        await ann.watch(await ann.submit(saving()))
        request = at.shard.requests[0]
        assert (request.max_handle_bytes, request.max_kept_bytes) == (10, 5)


async def test_keys_that_are_added_or_revoked_count_without_a_restart(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    async with lab(config, tmp_path, ann={}) as at:
        ann = at.clients["ann"]
        await ann.call("ListModels", pb.ListModelsRequest())
        text, key = new_key("bob", tier=Tier.BATCH)
        write_keys(tmp_path / "keys", [key])
        bob = dataclasses.replace(ann, key=text)
        await _until(bob, accepted=True)
        assert not await _accepts(ann)
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
        write_keys(tmp_path / "keys", [dataclasses.replace(key, expires_at=past)])
        await _until(bob, accepted=False)


async def _until(client: Client, *, accepted: bool) -> None:
    for _ in range(100):
        if await _accepts(client) is accepted:
            return
        await asyncio.sleep(0.2)
    raise AssertionError("the file has changed, and nothing else")


async def _accepts(client: Client) -> bool:
    try:
        await client.call("ListModels", pb.ListModelsRequest())
    except AuthenticationError:
        return False
    return True


async def test_who_guesses_keys_is_told_to_wait(config: SchedulerConfig, tmp_path: Path) -> None:
    async with lab(config, tmp_path, ann={}) as at:
        ann = at.clients["ann"]
        await ann.call("ListModels", pb.ListModelsRequest())
        reasons = []
        for number in range(25):
            guess = dataclasses.replace(ann, key=f"guess-{number}")
            err = await refusal(guess.call("ListModels", pb.ListModelsRequest()))
            reasons.append(err.reason)
        assert reasons[0] is Reason.INVALID_CREDENTIAL
        assert reasons[-1] is Reason.TOO_MANY_ATTEMPTS
        assert err.retry_after_seconds
        await ann.call("ListModels", pb.ListModelsRequest())


async def test_terms_outlive_the_server(config: SchedulerConfig, tmp_path: Path) -> None:
    limits = Limits(max_kept_bytes=5)
    async with lab(config, tmp_path, ann={"limits": limits}) as at:
        at.shard.hold.clear()
        await at.clients["ann"].submit(saving(), is_detached=True)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with asyncio.timeout(10):
            await shard.running.wait()
        assert shard.requests[0].max_kept_bytes == 5


def test_a_key_is_its_holders_alone() -> None:
    text, key = new_key("ann")
    assert isinstance(key, Key)
    assert text not in repr(key)

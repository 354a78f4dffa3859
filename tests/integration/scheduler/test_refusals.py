"""What a real server refuses, and with which error."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.intervention_pb2 import SourceLocation
from insitu_proto.v1.session_pb2 import Session
from insitu_scheduler.server import Server
from insitu_wire.errors import Error, Location, Reason
from support.fake_shard import FakeShard, log, read, saving, trace

from .conftest import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from insitu_scheduler.config import SchedulerConfig


async def test_every_method_needs_a_key(connect: Callable[[str], Client]) -> None:
    client = connect("")
    methods = ("SubmitSession", "GetSession", "CancelSession")
    for method in (*methods, "ListModels", "GetModel", "GetServerState"):
        with pytest.raises(Error) as caught:
            await client.call(method, getattr(pb, f"{method}Request")())
        assert caught.value.reason is Reason.MISSING_CREDENTIAL
    for method in ("WatchSession", "FetchResult", "DownloadTokenizer"):
        with pytest.raises(Error) as caught:
            _ = [part async for part in client.stream(method, getattr(pb, f"{method}Request")())]
        assert caught.value.reason is Reason.MISSING_CREDENTIAL


async def test_a_key_that_is_not_in_the_file_is_refused(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("ann: ann-key\n")
    config = dataclasses.replace(config, api_keys_file=tmp_path / "keys")
    async with Server(config) as server, grpc.aio.insecure_channel(server.address) as channel:
        await Client(channel, "ann-key").call("ListModels", pb.ListModelsRequest())
        with pytest.raises(Error) as caught:
            await Client(channel, "bob-key").call("ListModels", pb.ListModelsRequest())
    assert caught.value.reason is Reason.INVALID_CREDENTIAL


async def test_a_session_of_another_user_is_refused(
    connect: Callable[[str], Client], shard: FakeShard
) -> None:
    session_id = await connect("ann-key").submit(saving())
    bob = connect("bob-key")
    for call in (bob.watch, bob.state, bob.fetch, bob.cancel):
        with pytest.raises(Error) as caught:
            await call(session_id)
        assert caught.value.reason is Reason.PERMISSION_DENIED


async def test_an_unknown_session_is_not_found(client: Client) -> None:
    with pytest.raises(Error, match="'nope'") as caught:
        await client.watch("nope")
    assert caught.value.reason is Reason.SESSION_NOT_FOUND


async def test_a_bad_session_is_refused_at_the_users_line_and_not_kept(
    client: Client, shard: FakeShard
) -> None:
    where = SourceLocation(file="notebook.py", line=7, source="model.layrs[0]")
    session = Session(steps=[trace(read(1, "layrs", location=1))], locations=[where])
    with pytest.raises(Error, match="'layrs'") as caught:
        await client.submit(session, request_id="r")
    assert caught.value.reason is Reason.UNKNOWN_MODULE_PATH
    assert caught.value.location == Location("notebook.py", 7, "model.layrs[0]")
    await client.submit(saving(), request_id="r")


async def test_an_unknown_model_is_refused_with_those_served(
    client: Client, shard: FakeShard
) -> None:
    with pytest.raises(Error, match="tiny/model") as caught:
        await client.submit(Session(steps=[trace(model="gpt-9")]))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_a_log_needs_some_group_too(client: Client) -> None:
    with pytest.raises(Error, match="no model is served yet"):
        await client.submit(Session(steps=[log("hello")]))


async def test_a_request_id_is_required(client: Client, shard: FakeShard) -> None:
    with pytest.raises(Error, match="use a UUID") as caught:
        await client.call("SubmitSession", pb.SubmitSessionRequest(session=saving()))
    assert caught.value.reason is Reason.MALFORMED_SESSION


async def test_a_session_over_the_size_limit_is_refused(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, max_session_bytes=1000)
    async with Server(config) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(Error, match="at most 1,000") as caught:
            await Client(channel).submit(Session(steps=[log("x" * 1000)]))
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE


async def test_a_full_queue_refuses_and_takes_again_when_it_has_room(
    config: SchedulerConfig,
) -> None:
    config = dataclasses.replace(config, max_queued_sessions=1)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        shard.hold.clear()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            ids = [await client.submit(saving()) for _ in range(2)]
            with pytest.raises(Error, match="1 sessions wait already") as caught:
                await client.submit(saving())
            assert caught.value.reason is Reason.QUEUE_FULL
            await client.cancel(ids[1])
            await client.submit(saving())
            shard.hold.set()

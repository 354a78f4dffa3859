"""Tensors reach a server once, and shard groups when a session needs them."""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.error_reason_pb2 import ErrorReason
from insitu_proto.v1.intervention_pb2 import Call, Node
from insitu_proto.v1.session_pb2 import Session
from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_proto.v1.value_pb2 import Value
from insitu_scheduler.server import Server
from insitu_wire.content_hash import content_hash
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Error, Reason
from support.fake_shard import FakeShard, finished, read, reference, save, trace

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from insitu_scheduler.config import SchedulerConfig

DATA = bytes(range(256)) * 1024


def tensor(data: bytes = DATA) -> Tensor:
    spec = Tensor(dtype=Dtype.DTYPE_UINT8, shape=[len(data)])
    spec.content_hash = content_hash(spec, data)
    return spec


def using(*tensors: Tensor) -> Session:
    """A session that adds the first of some tensors to what it reads."""
    args = [reference(1), Value(tensor_index=0)]
    add = Node(id=2, call=Call(name="torch.add", args=args))
    return Session(steps=[trace(read(1), add, save(3, of=2))], tensors=tensors)


async def upload(client: Client, spec: Tensor, data: bytes = DATA) -> None:
    half = len(data) // 2
    parts = [part for part in (data[:half], data[half:]) if part]
    requests = [pb.UploadTensorRequest(tensor=spec)] if spec.ByteSize() else []
    requests += [pb.UploadTensorRequest(data=part) for part in parts]
    try:
        await client.stub.UploadTensor(iter(requests), metadata=client.metadata)
    except grpc.aio.AioRpcError as rpc_error:
        raise from_rpc_error(rpc_error, address="the test server") from None


async def missing(client: Client, *tensors: Tensor) -> list[str]:
    hashes = [spec.content_hash for spec in tensors]
    request = pb.FindMissingUploadsRequest(content_hashes=hashes)
    return list((await client.call("FindMissingUploads", request)).content_hashes)


async def refused(client: Client, session: Session) -> Error:
    with pytest.raises(Error) as caught:
        await client.submit(session)
    return caught.value


async def test_a_session_is_taken_once_its_tensor_is_uploaded(
    client: Client, shard: FakeShard
) -> None:
    request_id = str(uuid.uuid4())
    with pytest.raises(Error) as caught:
        await client.submit(using(tensor()), request_id=request_id)
    assert caught.value.reason is Reason.TENSOR_NOT_UPLOADED
    assert await missing(client, tensor()) == [tensor().content_hash]
    await upload(client, tensor())
    assert await missing(client, tensor()) == []
    session_id = await client.submit(using(tensor()), request_id=request_id)
    assert names(await client.watch(session_id))[-1] == "COMPLETED"
    assert shard.uploads == {tensor().content_hash: DATA}
    (segment,) = (request.segment for request in shard.requests)
    assert list(segment.tensors) == [tensor()]


async def test_a_group_is_sent_only_what_it_lacks(client: Client, shard: FakeShard) -> None:
    await upload(client, tensor())
    shard.uploads[tensor().content_hash] = b"from before"
    await client.watch(await client.submit(using(tensor())))
    assert shard.uploads == {tensor().content_hash: b"from before"}


async def test_a_tensor_that_made_room_for_other_sessions_is_sent_again(
    client: Client, shard: FakeShard
) -> None:
    await upload(client, tensor())

    async def lose_it_once(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
        if len(shard.requests) == 1:
            shard.uploads.clear()
            reason = error_reason_pb2.ERROR_REASON_TENSOR_NOT_UPLOADED
            yield RunSegmentResponse(failure=error_reason_pb2.Failure(reason=reason))
            return
        yield finished()

    shard.script = lose_it_once
    events = await client.watch(await client.submit(using(tensor())))
    assert names(events)[-1] == "COMPLETED"
    assert len(shard.requests) == 2
    assert shard.uploads == {tensor().content_hash: DATA}


async def test_what_is_wrong_with_a_session_is_told_before_its_tensors_are_asked_for(
    client: Client, shard: FakeShard
) -> None:
    session = using(tensor())
    session.steps[0].trace.nodes[1].call.name = "os.system"
    assert (await refused(client, session)).reason is Reason.UNKNOWN_OPERATION


async def test_content_of_another_hash_is_refused(client: Client) -> None:
    with pytest.raises(Error) as caught:
        await upload(client, tensor(), DATA[:-1] + b"!")
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert await missing(client, tensor()) == [tensor().content_hash]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Tensor(), Reason.MALFORMED_SESSION),
        (Tensor(dtype=1, shape=[1], content_hash="../x"), Reason.MALFORMED_SESSION),
        (Tensor(dtype=9, shape=[2**40], content_hash="0" * 64), Reason.REQUEST_TOO_LARGE),
    ],
    ids=["no description", "no hash", "too large"],
)
async def test_an_upload_that_breaks_a_rule_is_refused(
    client: Client, spec: Tensor, reason: Reason
) -> None:
    with pytest.raises(Error) as caught:
        await upload(client, spec, b"")
    assert caught.value.reason is reason


async def test_an_upload_is_its_users_alone(
    connect: Callable[[str], Client], shard: FakeShard
) -> None:
    ann, bob = connect("ann-key"), connect("bob-key")
    await upload(ann, tensor())
    assert await missing(bob, tensor()) == [tensor().content_hash]
    assert (await refused(bob, using(tensor()))).reason is Reason.TENSOR_NOT_UPLOADED
    with pytest.raises(Error) as caught:
        await upload(connect(""), tensor(), b"")
    assert caught.value.reason is Reason.MISSING_CREDENTIAL


async def test_uploads_outlive_the_server(config: SchedulerConfig) -> None:
    for is_first in (True, False):
        async with Server(config) as server, FakeShard(server.address) as shard:
            await shard.ready()
            async with grpc.aio.insecure_channel(server.address) as channel:
                client = Client(channel)
                if is_first:
                    await upload(client, tensor())
                await client.watch(await client.submit(using(tensor())))
                assert shard.uploads == {tensor().content_hash: DATA}


async def test_a_session_that_waits_keeps_its_tensors(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, upload_store_bytes=2 * len(DATA))
    others = [tensor(letter * len(DATA)) for letter in (b"a", b"b", b"c")]
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        shard.hold.clear()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            await upload(client, tensor())
            running, waiting = [await client.submit(using(tensor())) for _ in range(2)]
            for spec, letter in zip(others, (b"a", b"b", b"c"), strict=True):
                await upload(client, spec, letter * len(DATA))
            assert await missing(client, *others) == [spec.content_hash for spec in others[:2]]
            await shard.running.wait()
            shard.uploads.clear()
            shard.hold.set()
            await client.watch(running)
            assert names(await client.watch(waiting))[-1] == "COMPLETED"
            assert shard.uploads == {tensor().content_hash: DATA}
            await upload(client, others[0], b"a" * len(DATA))
            await upload(client, others[1], b"b" * len(DATA))
            assert await missing(client, tensor()) == [tensor().content_hash]


async def test_a_group_that_comes_after_one_was_lost_gets_the_tensor_too(
    client: Client, server: Server
) -> None:
    async with FakeShard(server.address) as lost:
        await lost.ready()
        await upload(client, tensor())
        await client.watch(await client.submit(using(tensor())))
    async with FakeShard(server.address, group_id="group-2") as next_group:
        await next_group.ready()
        session_id = await client.submit(using(tensor()))
        assert names(await client.watch(session_id))[-1] == "COMPLETED"
        assert next_group.uploads == lost.uploads == {tensor().content_hash: DATA}


async def test_a_tensor_that_the_disk_spoiled_is_asked_for_again(
    client: Client, shard: FakeShard
) -> None:
    await upload(client, tensor())
    shard.refuses_uploads = True
    session_id = await client.submit(using(tensor()))
    failure = (await client.watch(session_id))[-1].failure
    assert failure.reason == ErrorReason.ERROR_REASON_CHECKSUM_MISMATCH
    shard.refuses_uploads = False
    assert (await refused(client, using(tensor()))).reason is Reason.TENSOR_NOT_UPLOADED

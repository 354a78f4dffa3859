"""One user gets at nothing of another's: each way is tried on one real server."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.intervention_pb2 import Keep, Load, Node
from insitu_proto.v1.session_pb2 import Session
from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_proto.v1.value_pb2 import Value
from insitu_wire.content_hash import content_hash
from insitu_wire.errors import Error, Reason
from support.fake_shard import FakeShard, read, reference, save, saving, trace

from .conftest import Client, names

HANDLE = "h" * 32
DATA = bytes(range(64)) * 1024


@dataclass
class Scene:
    """What Ann has on the server, and the two who ask for it."""

    ann: Client
    bob: Client
    shard: FakeShard
    session_id: str
    tensor: Tensor


@pytest.fixture
async def scene(connect: Callable[[str], Client], shard: FakeShard) -> Scene:
    ann = connect("ann-key")
    tensor = Tensor(dtype=Dtype.DTYPE_UINT8, shape=[len(DATA)])
    tensor.content_hash = content_hash(tensor, memoryview(DATA))
    parts = [pb.UploadTensorRequest(tensor=tensor), pb.UploadTensorRequest(data=DATA)]
    await ann.stub.UploadTensor(iter(parts), metadata=ann.metadata)
    kept = Node(id=3, keep=Keep(value=reference(1), handle_id=HANDLE))
    session_id = await ann.submit(Session(steps=[trace(read(1), save(2, of=1), kept)]))
    assert names(await ann.watch(session_id))[-1] == "COMPLETED"
    return Scene(ann, connect("bob-key"), shard, session_id, tensor)


async def refused(awaited: Any) -> Reason:
    with pytest.raises(Error) as caught:
        await awaited
    return caught.value.reason


def loading(handle_id: str) -> Session:
    return Session(steps=[trace(Node(id=1, load=Load(handle_id=handle_id)), save(2, of=1))])


def using(tensor: Tensor) -> Session:
    node = Node(id=1)
    node.save.value.CopyFrom(Value(tensor_index=0))
    return Session(steps=[trace(node)], tensors=[tensor])


@pytest.mark.parametrize("way", ["watch", "state", "fetch", "cancel"])
async def test_anothers_session_and_result_are_refused(scene: Scene, way: str) -> None:
    assert await refused(getattr(scene.bob, way)(scene.session_id)) is Reason.PERMISSION_DENIED


async def test_a_partial_result_of_another_is_refused(scene: Scene) -> None:
    fetching = scene.bob.fetch(scene.session_id, 2, is_partial=True)
    assert await refused(fetching) is Reason.PERMISSION_DENIED


@pytest.mark.parametrize("guess", ["", "../results", "%", "x" * 100_000, str(uuid.UUID(int=0))])
async def test_a_guessed_session_is_not_there(scene: Scene, guess: str) -> None:
    for way in (scene.bob.watch, scene.bob.state, scene.bob.fetch, scene.bob.cancel):
        assert await refused(way(guess)) is Reason.SESSION_NOT_FOUND


async def test_a_list_has_ones_own_sessions_alone_also_from_anothers_on(scene: Scene) -> None:
    own = await scene.bob.submit(saving())
    await scene.bob.watch(own)
    listed = await scene.bob.call("ListSessions", pb.ListSessionsRequest())
    assert [row.session_id for row in listed.sessions] == [own]
    request = pb.ListSessionsRequest(page_token=scene.session_id)
    assert not (await scene.bob.call("ListSessions", request)).sessions


async def test_anothers_kept_value_can_not_be_loaded_released_or_replaced(scene: Scene) -> None:
    release = pb.ReleaseKeptValueRequest(handle_id=HANDLE)
    assert await refused(scene.bob.submit(loading(HANDLE))) is Reason.PERMISSION_DENIED
    assert await refused(scene.bob.call("ReleaseKeptValue", release)) is Reason.PERMISSION_DENIED
    # A handle of the same name is another one: the shard is told whose each session is.
    kept = Node(id=2, keep=Keep(value=reference(1), handle_id=HANDLE))
    await scene.bob.watch(await scene.bob.submit(Session(steps=[trace(read(1), kept)])))
    for client in (scene.ann, scene.bob):
        await client.watch(await client.submit(loading(HANDLE)))
    users = [request.user for request in scene.shard.requests]
    assert users[0] == users[2]
    assert users[1] == users[3]
    assert users[0] != users[1]


async def test_a_refused_handle_tells_nothing_of_whose_it_is_and_of_what(scene: Scene) -> None:
    with pytest.raises(Error) as caught:
        await scene.bob.submit(loading(HANDLE))
    assert caught.value.metadata.keys() == {"handleId"}
    told = str(caught.value)
    assert not any(secret in told for secret in ("ann", scene.session_id, scene.shard.model))


async def test_a_guessed_handle_is_not_there(scene: Scene) -> None:
    guess = uuid.UUID(int=0).hex
    assert await refused(scene.bob.submit(loading(guess))) is Reason.HANDLE_NOT_FOUND
    release = pb.ReleaseKeptValueRequest(handle_id=guess)
    assert not (await scene.bob.call("ReleaseKeptValue", release)).had_value


async def test_anothers_upload_is_not_told_of_and_not_given(scene: Scene) -> None:
    request = pb.FindMissingUploadsRequest(content_hashes=[scene.tensor.content_hash])
    told = await scene.bob.call("FindMissingUploads", request)
    assert list(told.content_hashes) == [scene.tensor.content_hash]
    assert await refused(scene.bob.submit(using(scene.tensor))) is Reason.TENSOR_NOT_UPLOADED
    await scene.ann.watch(await scene.ann.submit(using(scene.tensor)))


async def test_anothers_request_id_gives_a_session_of_ones_own(scene: Scene) -> None:
    first = await scene.ann.submit(saving(), request_id="the-same")
    second = await scene.bob.submit(saving(), request_id="the-same")
    assert first != second
    await scene.bob.watch(second)
    assert await scene.ann.submit(saving(), request_id="the-same") == first


async def test_no_key_no_call_of_any_method(scene: Scene) -> None:
    nobody = replace(scene.ann, key="")
    for method in pb.DESCRIPTOR.services_by_name["SchedulerService"].methods:
        request = getattr(pb, method.input_type.name)()
        with pytest.raises(Error) as caught:
            if method.client_streaming:
                await nobody.call(method.name, iter([request]))
            elif method.server_streaming:
                _ = [part async for part in nobody.stream(method.name, request)]
            else:
                await nobody.call(method.name, request)
        assert caught.value.reason is Reason.MISSING_CREDENTIAL, method.name

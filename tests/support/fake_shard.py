"""A real gRPC shard service that plays scripts instead of running a model."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from insitu_proto.v1 import model_pb2, registry_service_pb2_grpc, shard_service_pb2_grpc, value_pb2
from insitu_proto.v1 import shard_service_pb2 as pb
from insitu_proto.v1.intervention_pb2 import HookPoint, HookSide, Log, Node, Read, Save
from insitu_proto.v1.placement_pb2 import ShardGroup
from insitu_proto.v1.registry_service_pb2 import KeepAlive, RegisterGroupRequest
from insitu_proto.v1.result_pb2 import SavedValue
from insitu_proto.v1.session_pb2 import Session, Step
from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
from insitu_proto.v1.tensor_pb2 import Dtype, Tensor
from insitu_proto.v1.trace_pb2 import Invoke, TokenRow, Trace, TraceMode
from insitu_wire.callers import CallerCheck, carrying
from insitu_wire.content_hash import wrong_content
from insitu_wire.interceptor import ErrorInterceptor
from insitu_wire.limits import (
    ACCESS_TOKEN_METADATA,
    CHUNK_BYTES,
    JOIN_TOKEN_METADATA,
    SERVER_OPTIONS,
)
from insitu_wire.tls import SCHEDULER_NAME, Tls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Script = Callable[[RunSegmentRequest], AsyncIterator[RunSegmentResponse]]

MODEL = "tiny/model"
VOCABULARY = 100


def read(node_id: int, path: str = "lm_head", **fields: Any) -> Node:
    hook_point = HookPoint(module_path=path, side=HookSide.HOOK_SIDE_OUTPUT)
    return Node(id=node_id, read=Read(hook_point=hook_point), **fields)


def reference(node_id: int) -> value_pb2.Value:
    return value_pb2.Value(reference=value_pb2.Reference(node_id=node_id))


def save(node_id: int, of: int, **fields: Any) -> Node:
    return Node(id=node_id, save=Save(value=reference(of)), **fields)


def trace(*nodes: Node, model: str = MODEL) -> Step:
    invoke = Invoke(rows=[TokenRow(token_ids=[1, 2, 3])])
    mode = TraceMode.TRACE_MODE_FORWARD
    return Step(trace=Trace(model=model, mode=mode, invokes=[invoke], nodes=nodes))


def log(text: str) -> Step:
    return Step(log=Log(values=[value_pb2.Value(str_value=text)]))


def saving(node_id: int = 1) -> Session:
    """A session of one trace that saves one value, under the id after node_id."""
    return Session(steps=[trace(read(node_id), save(node_id + 1, of=node_id))])


def describe(name: str = MODEL) -> model_pb2.ModelDescription:
    """Describes a model of two layers."""
    paths = ["", "model", "model.layers", "model.layers.0", "model.layers.1", "lm_head"]
    return model_pb2.ModelDescription(
        name=name,
        config_json=f'{{"vocab_size": {VOCABULARY}}}',
        class_name="TinyForCausalLM",
        modules=[model_pb2.Module(path=path) for path in paths],
        tokenizer_hash="0" * 64,
    )


def trace_started(number: int, *, num_tokens: int = 0) -> RunSegmentResponse:
    started = pb.TraceStarted(trace_number=number, num_tokens=num_tokens)
    return RunSegmentResponse(trace_started=started)


def log_line(message: str) -> RunSegmentResponse:
    return RunSegmentResponse(log_line=pb.LogLine(message=message))


def finished(*, has_exited: bool = False) -> RunSegmentResponse:
    return RunSegmentResponse(finished=pb.SegmentFinished(has_exited=has_exited))


def saved(node_id: int, data: bytes, *, crc32: int | None = None) -> list[RunSegmentResponse]:
    """A saved tensor of bytes, and its data in chunks."""
    tensor = Tensor(dtype=Dtype.DTYPE_UINT8, shape=[len(data)], data_offset=0)
    header = SavedValue(
        node_id=node_id,
        name=f"v{node_id}",
        value=value_pb2.Value(tensor=tensor),
        num_bytes=len(data),
        crc32=zlib.crc32(data) if crc32 is None else crc32,
    )
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return [
        RunSegmentResponse(saved_value=header),
        *(RunSegmentResponse(data=chunk) for chunk in chunks),
    ]


async def as_described(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
    """Starts each trace, prints each log step, saves four bytes a save node."""
    number = request.segment.first_trace_number
    for step in request.segment.steps:
        if step.HasField("trace"):
            yield trace_started(number)
            number += 1
        for value in step.log.values:
            yield log_line(value.str_value)
        for node in step.trace.nodes:
            if node.HasField("save"):
                for response in saved(node.id, bytes([node.id] * 4)):
                    yield response
        if step.HasField("exit"):
            yield finished(has_exited=True)
            return
    yield finished()


@dataclass
class FakeShard(shard_service_pb2_grpc.ShardServiceServicer):
    """One shard group: a context manager that serves, and registers where it is told to."""

    scheduler: str
    model: str = MODEL
    script: Script = as_described
    group_id: str = "group-1"
    max_sessions: int = 1
    requests: list[RunSegmentRequest] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    metadata: list[Any] = field(default_factory=list)
    """Of the calls that ran segments."""
    pauses: list[tuple[str, bool]] = field(default_factory=list)
    """Sessions that were held (True) or let go on."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    refuses_uploads: bool = False
    num_cancelled: int = 0
    join_token: str = ""
    access_token: str = ""
    tls: Tls = field(default_factory=Tls)
    num_tokenizer_fetches: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        self.running = asyncio.Event()
        self.registered = asyncio.Event()
        self.has_released = asyncio.Event()
        self.may_keep_alive = asyncio.Event()
        self.may_keep_alive.set()
        self.hold = asyncio.Event()
        self.hold.set()

    async def __aenter__(self) -> FakeShard:
        peers_only = CallerCheck(
            "insitu.v1.ShardService",
            metadata_key=ACCESS_TOKEN_METADATA,
            token=self.access_token,
            names=frozenset({SCHEDULER_NAME} if self.tls.is_mutual else ()),
        )
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(), peers_only], options=SERVER_OPTIONS
        )
        shard_service_pb2_grpc.add_ShardServiceServicer_to_server(self, self._server)
        port = self.tls.add_port(self._server, "127.0.0.1:0", is_mutual=True)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        self._registration = asyncio.create_task(self._register())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.leave()
        await self._server.stop(None)

    async def ready(self) -> FakeShard:
        """Waits for the lease."""
        async with asyncio.timeout(20):
            await self.registered.wait()
        return self

    async def leave(self) -> None:
        """Ends the registration, as a process that dies does."""
        self._registration.cancel()
        await asyncio.wait([self._registration])

    async def _register(self) -> None:
        group = ShardGroup(
            group_id=self.group_id,
            model=self.model,
            address=self.address,
            num_ranks=1,
            max_sessions=self.max_sessions,
        )
        async with self.tls.channel(self.scheduler, SCHEDULER_NAME) as channel:
            stub = registry_service_pb2_grpc.RegistryServiceStub(
                carrying(channel, JOIN_TOKEN_METADATA, self.join_token)
            )
            call = stub.RegisterGroup()
            first = RegisterGroupRequest(group=group, access_token=self.access_token)
            await call.write(first)
            while (response := await call.read()) is not grpc.aio.EOF:
                self.registered.set()
                await asyncio.sleep(response.lease.ttl.ToTimedelta().total_seconds() / 4)
                await self.may_keep_alive.wait()
                await call.write(RegisterGroupRequest(keep_alive=KeepAlive()))

    async def DescribeModel(self, request: Any, context: Any) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(description=describe(self.model))

    async def FetchTokenizer(
        self, request: Any, context: Any
    ) -> AsyncIterator[pb.FetchTokenizerResponse]:
        self.num_tokenizer_fetches += 1
        yield pb.FetchTokenizerResponse(file_name="tokenizer.json", data=b"{")
        yield pb.FetchTokenizerResponse(file_name="tokenizer.json", data=b"}")
        yield pb.FetchTokenizerResponse(file_name="empty.txt", data=b"")

    async def HoldUploads(self, request: Any, context: Any) -> pb.HoldUploadsResponse:
        hashes = [tensor.content_hash for tensor in request.tensors]
        missing = [name for name in hashes if name not in self.uploads]
        return pb.HoldUploadsResponse(content_hashes=missing)

    async def StoreUpload(self, requests: Any, context: Any) -> pb.StoreUploadResponse:
        tensor = (await anext(requests)).tensor
        data = b"".join([request.data async for request in requests])
        if self.refuses_uploads:
            raise wrong_content(tensor, "other content")
        self.uploads[tensor.content_hash] = data
        return pb.StoreUploadResponse()

    async def RunSegment(
        self, request: RunSegmentRequest, context: Any
    ) -> AsyncIterator[RunSegmentResponse]:
        self.requests.append(request)
        self.metadata.append(context.invocation_metadata())
        self.running.set()
        try:
            await self.hold.wait()
            async for response in self.script(request):
                yield response
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def PauseSession(self, request: Any, context: Any) -> pb.PauseSessionResponse:
        self.pauses.append((request.session_id, not request.goes_on))
        return pb.PauseSessionResponse()

    async def ReleaseSession(self, request: Any, context: Any) -> pb.ReleaseSessionResponse:
        self.released.append(request.session_id)
        self.has_released.set()
        return pb.ReleaseSessionResponse(num_values=0)

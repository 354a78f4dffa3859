"""The gRPC service of a shard group's leader."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_shard.codec import to_fetched, to_responses
from insitu_shard.engine import Saved, num_bytes
from insitu_shard.imports import fetch_values
from insitu_shard.upload_cache import receive_upload
from insitu_wire.batching import together
from insitu_wire.limits import CHUNK_BYTES
from insitu_wire.tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

    from insitu_proto.v1 import model_pb2
    from insitu_shard.engine import SegmentEvent
    from insitu_shard.engine_thread import EngineThread
    from insitu_shard.group import Leader
    from insitu_wire.errors import Error
    from insitu_wire.tls import Tls

    Context = grpc.aio.ServicerContext[Any, Any]


_TRACING = Tracing("insitu-shard")


class ShardServicer(shard_service_pb2_grpc.ShardServiceServicer):
    """Runs segments of several sessions beside each other."""

    def __init__(
        self,
        leader: Leader,
        description: model_pb2.ModelDescription,
        engine: EngineThread,
        tls: Tls,
    ) -> None:
        """Makes the service.

        Args:
            leader: runs segments on all ranks; on the engine's thread only.
            description: the model's.
            engine: does what the leader is asked for.
            tls: how the group shows other groups who it is.
        """
        self._tls = tls
        self._leader = leader
        self._description = description
        self._engine = engine

    async def DescribeModel(
        self, request: shard_service_pb2.DescribeModelRequest, context: Context
    ) -> shard_service_pb2.DescribeModelResponse:
        """Describes the model."""
        return shard_service_pb2.DescribeModelResponse(description=self._description)

    async def FetchTokenizer(
        self, request: shard_service_pb2.FetchTokenizerRequest, context: Context
    ) -> AsyncIterator[shard_service_pb2.FetchTokenizerResponse]:
        """Streams the tokenizer's files."""
        for path in self._leader.model.tokenizer_files:
            content = await asyncio.to_thread(path.read_bytes)
            for start in range(0, max(len(content), 1), CHUNK_BYTES):
                yield shard_service_pb2.FetchTokenizerResponse(
                    file_name=path.name, data=content[start : start + CHUNK_BYTES]
                )

    async def HoldUploads(
        self, request: shard_service_pb2.HoldUploadsRequest, context: Context
    ) -> shard_service_pb2.HoldUploadsResponse:
        """Holds uploaded tensors for a session, and tells which the group lacks."""
        uploads = self._leader.uploads
        missing = await self._engine.do(lambda: uploads.hold(request.session_id, request.tensors))
        return shard_service_pb2.HoldUploadsResponse(content_hashes=missing)

    async def StoreUpload(
        self, requests: AsyncIterator[shard_service_pb2.StoreUploadRequest], context: Context
    ) -> shard_service_pb2.StoreUploadResponse:
        """Stores an uploaded tensor on all ranks."""
        spec = (await anext(requests)).tensor
        data = await receive_upload(spec, (request.data async for request in requests))
        await self._engine.do(lambda: self._leader.store_upload(spec, data))
        return shard_service_pb2.StoreUploadResponse()

    async def RunSegment(
        self, request: shard_service_pb2.RunSegmentRequest, context: Context
    ) -> AsyncIterator[shard_service_pb2.RunSegmentResponse]:
        """Runs a segment beside those of other sessions, and streams what happens."""
        session_id, model = request.session_id, self._description.name
        parent = request.traceparent
        with _TRACING.span("insitu.segment", parent, session_id=session_id, model=model):
            async for response in self._run(request):
                yield response

    async def _run(
        self, request: shard_service_pb2.RunSegmentRequest
    ) -> AsyncIterator[shard_service_pb2.RunSegmentResponse]:
        for imported, data in [
            await fetch_values(request, at, self._tls) for at in request.imports
        ]:
            await self._engine.do(partial(self._leader.store_values, imported, data))
        async with aclosing(self._engine.run(request)) as told:
            async for events in told:
                async for response in _responses(events, may_batch=request.may_batch):
                    yield response

    async def PauseSession(
        self, request: shard_service_pb2.PauseSessionRequest, context: Context
    ) -> shard_service_pb2.PauseSessionResponse:
        """Holds a session's segment before its next trace, or lets it go on."""
        await self._engine.pause(request.session_id, goes_on=request.goes_on)
        return shard_service_pb2.PauseSessionResponse()

    async def FetchValues(
        self, request: shard_service_pb2.FetchValuesRequest, context: Context
    ) -> AsyncIterator[shard_service_pb2.FetchValuesResponse]:
        """Streams values of a session to another group."""
        values = await self._engine.do(
            lambda: self._leader.values(request.session_id, request.node_ids)
        )
        for node_id, value in values.items():
            for response in to_fetched(node_id, value):
                yield response

    async def ReleaseHandle(
        self, request: shard_service_pb2.ReleaseHandleRequest, context: Context
    ) -> shard_service_pb2.ReleaseHandleResponse:
        """Lets go of a kept value."""
        had_value = await self._engine.do(
            lambda: self._leader.let_go(request.user, request.handle_id)
        )
        return shard_service_pb2.ReleaseHandleResponse(had_value=had_value)

    async def ReleaseSession(
        self, request: shard_service_pb2.ReleaseSessionRequest, context: Context
    ) -> shard_service_pb2.ReleaseSessionResponse:
        """Frees all values of a session."""
        num_values = await self._engine.do(lambda: self._leader.release(request.session_id))
        return shard_service_pb2.ReleaseSessionResponse(num_values=num_values)

    async def release_all(self) -> None:
        """Frees the values of all sessions: the scheduler that would have is gone."""
        await self._engine.do(self._leader.release_all)

    async def tidy(self, interval_seconds: float) -> None:
        """Lets go of kept values that nobody has used for long, now and then."""
        while True:
            await asyncio.sleep(interval_seconds)
            await self._engine.do(self._leader.let_go_of_unused)


async def _responses(
    events: Sequence[SegmentEvent | Error], *, may_batch: bool
) -> AsyncIterator[shard_service_pb2.RunSegmentResponse]:
    """Encodes events that are told at once; large values by themselves, others together."""
    small: list[shard_service_pb2.RunSegmentResponse] = []
    for event in events:
        responses = to_responses(event)
        if not isinstance(event, Saved) or num_bytes(event.value) <= CHUNK_BYTES:
            small.extend(responses)
            continue
        for response in together(small, may_batch=may_batch):
            yield response
        small = []
        # Its checksum comes first, and takes long.
        yield await asyncio.to_thread(next, responses)
        for response in responses:
            yield response
    for response in together(small, may_batch=may_batch):
        yield response

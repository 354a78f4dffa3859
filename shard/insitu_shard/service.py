"""The gRPC service of a shard group's leader."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_shard.codec import to_fetched, to_responses
from insitu_shard.engine import Finished, SegmentEvent, TraceStarted
from insitu_shard.imports import fetch_values
from insitu_shard.upload_cache import receive_upload
from insitu_wire.errors import Error, to_failure
from insitu_wire.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from concurrent.futures import ThreadPoolExecutor
    from typing import TypeVar

    import grpc

    from insitu_proto.v1 import model_pb2
    from insitu_shard.group import Leader
    from insitu_shard.metrics import ShardMetrics

    Context = grpc.aio.ServicerContext[Any, Any]
    T = TypeVar("T")

_log = logging.getLogger(__name__)


class ShardServicer(shard_service_pb2_grpc.ShardServiceServicer):
    """Runs segments one at a time on the group's own thread, in the order of arrival."""

    def __init__(
        self,
        leader: Leader,
        description: model_pb2.ModelDescription,
        metrics: ShardMetrics,
        *,
        thread: ThreadPoolExecutor,
        on_lost: Callable[[], None],
    ) -> None:
        """Makes the service.

        Args:
            leader: runs segments on all ranks.
            description: the model's.
            metrics: where segments are counted.
            thread: the one thread that runs the engine.
            on_lost: called when the group can not go on.
        """
        self._on_lost = on_lost
        self._leader = leader
        self._description = description
        self._metrics = metrics
        self._thread = thread

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
        missing = await self._on_engine(lambda: uploads.hold(request.session_id, request.tensors))
        return shard_service_pb2.HoldUploadsResponse(content_hashes=missing)

    async def StoreUpload(
        self, requests: AsyncIterator[shard_service_pb2.StoreUploadRequest], context: Context
    ) -> shard_service_pb2.StoreUploadResponse:
        """Stores an uploaded tensor on all ranks."""
        spec = (await anext(requests)).tensor
        data = await receive_upload(spec, (request.data async for request in requests))
        await self._on_engine(lambda: self._leader.store_upload(spec, data))
        return shard_service_pb2.StoreUploadResponse()

    async def RunSegment(
        self, request: shard_service_pb2.RunSegmentRequest, context: Context
    ) -> AsyncIterator[shard_service_pb2.RunSegmentResponse]:
        """Runs a segment and streams what happens."""
        for imported, data in [await fetch_values(request, at) for at in request.imports]:
            await self._on_engine(partial(self._leader.store_values, imported, data))
        loop = asyncio.get_running_loop()
        responses: asyncio.Queue[SegmentEvent | Error] = asyncio.Queue()
        cancelled = threading.Event()

        def run() -> None:
            for event in self._run(request, cancelled):
                loop.call_soon_threadsafe(responses.put_nowait, event)

        running = loop.run_in_executor(self._thread, run)
        running.add_done_callback(self._check)
        try:
            while True:
                event = await responses.get()
                if isinstance(event, Error):
                    yield shard_service_pb2.RunSegmentResponse(failure=to_failure(event))
                    return
                for response in to_responses(event):
                    yield response
                if isinstance(event, Finished):
                    return
        finally:
            cancelled.set()
            await asyncio.shield(running)

    async def FetchValues(
        self, request: shard_service_pb2.FetchValuesRequest, context: Context
    ) -> AsyncIterator[shard_service_pb2.FetchValuesResponse]:
        """Streams values of a session to another group."""
        values = await self._on_engine(
            lambda: self._leader.values(request.session_id, request.node_ids)
        )
        for node_id, value in values.items():
            for response in to_fetched(node_id, value):
                yield response

    async def ReleaseHandle(
        self, request: shard_service_pb2.ReleaseHandleRequest, context: Context
    ) -> shard_service_pb2.ReleaseHandleResponse:
        """Lets go of a kept value."""
        had_value = await self._on_engine(
            lambda: self._leader.let_go(request.user, request.handle_id)
        )
        return shard_service_pb2.ReleaseHandleResponse(had_value=had_value)

    async def ReleaseSession(
        self, request: shard_service_pb2.ReleaseSessionRequest, context: Context
    ) -> shard_service_pb2.ReleaseSessionResponse:
        """Frees all values of a session."""
        num_values = await self._on_engine(lambda: self._leader.release(request.session_id))
        return shard_service_pb2.ReleaseSessionResponse(num_values=num_values)

    async def tidy(self, interval_seconds: float) -> None:
        """Lets go of kept values that nobody has used for long, now and then."""
        while True:
            await asyncio.sleep(interval_seconds)
            await self._on_engine(self._leader.let_go_of_unused)

    def stop(self) -> None:
        """Waits for what runs, and ends the followers."""
        self._thread.submit(self._leader.stop).result()
        self._thread.shutdown()

    async def _on_engine(self, work: Callable[[], T]) -> T:
        """Does work on the group's own thread, after what was asked before."""
        working = asyncio.get_running_loop().run_in_executor(self._thread, work)
        working.add_done_callback(self._check)
        # Ranks in step can not stop halfway when a caller goes away.
        return await asyncio.shield(working)

    def _run(
        self, request: shard_service_pb2.RunSegmentRequest, cancelled: threading.Event
    ) -> Iterator[SegmentEvent | Error]:
        """Yields events until the segment ends, fails or is cancelled; on the engine's thread."""
        started = time.monotonic()
        outcome = "cancelled"
        try:
            run = self._leader.run_segment(request, is_cancelled=cancelled.is_set)
            for event in run:
                if isinstance(event, TraceStarted):
                    self._metrics.trace_started()
                elif isinstance(event, Finished):
                    outcome = "completed"
                yield event
        except Error as err:
            outcome = "failed"
            yield err
        self._metrics.segment_ended(outcome, time.monotonic() - started)

    def _check(self, finished: asyncio.Future[Any]) -> None:
        """Gives up the group on what no session can cause, such as a lost rank."""
        exception = None if finished.cancelled() else finished.exception()
        if exception is not None and not isinstance(exception, Error):
            _log.critical("the shard group is lost", exc_info=exception)
            self._on_lost()

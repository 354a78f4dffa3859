"""The scheduler's gRPC service for clients: decode, call, encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1 import scheduler_service_pb2_grpc
from insitu_proto.v1.event_pb2 import EventKind
from insitu_proto.v1.placement_pb2 import ShardGroup, ShardGroupState
from insitu_scheduler.auth import caller, check_admin, check_model
from insitu_scheduler.events import TERMINAL_KINDS
from insitu_scheduler.queue import SessionId
from insitu_scheduler.refusals import check_limit, malformed
from insitu_scheduler.validation import MAX_TENSORS
from insitu_scheduler.value_checks import check_upload
from insitu_wire.batching import together
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import CHUNK_BYTES
from insitu_wire.operations import OPERATIONS_VERSION
from insitu_wire.tracing import METADATA_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

    from insitu_proto.v1.event_pb2 import Event
    from insitu_proto.v1.result_pb2 import SavedValue
    from insitu_scheduler.admission import Admission
    from insitu_scheduler.dispatch import Dispatcher
    from insitu_scheduler.events import EventBook, EventLog
    from insitu_scheduler.journal import SessionRow
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.models import ModelCatalog
    from insitu_scheduler.registry import Group, Registry
    from insitu_scheduler.results import ResultStore, StoredValue
    from insitu_scheduler.uploads import UploadStore

    Context = grpc.aio.ServicerContext[Any, Any]


_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000
_MAX_TRACEPARENT = 64


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Answers clients; the gate has found whose each call is."""

    def __init__(
        self,
        *,
        admission: Admission,
        book: EventBook,
        dispatcher: Dispatcher,
        results: ResultStore,
        uploads: UploadStore,
        catalog: ModelCatalog,
        registry: Registry,
        metrics: SchedulerMetrics,
        version: str,
        max_session_bytes: int,
    ) -> None:
        self._admission = admission
        self._book = book
        self._dispatcher = dispatcher
        self._results = results
        self._uploads = uploads
        self._catalog = catalog
        self._registry = registry
        self._metrics = metrics
        self._version = version
        self._max_session_bytes = max_session_bytes

    async def SubmitSession(
        self, request: pb.SubmitSessionRequest, context: Context
    ) -> pb.SubmitSessionResponse:
        """Submits a session."""
        try:
            session_id = await self._admission.submit(
                caller(), request, traceparent=_traceparent(context)
            )
        except Error as err:
            self._metrics.rejected(err.reason)
            raise
        return pb.SubmitSessionResponse(session_id=session_id)

    async def FindMissingUploads(
        self, request: pb.FindMissingUploadsRequest, context: Context
    ) -> pb.FindMissingUploadsResponse:
        """Tells which tensors the caller has to upload."""
        check_limit("tensors", len(request.content_hashes), MAX_TENSORS)
        missing = self._uploads.missing(caller().user, request.content_hashes)
        return pb.FindMissingUploadsResponse(content_hashes=missing)

    async def UploadTensor(
        self, requests: AsyncIterator[pb.UploadTensorRequest], context: Context
    ) -> pb.UploadTensorResponse:
        """Takes in a tensor."""
        first = await anext(requests, pb.UploadTensorRequest())
        check_upload(first.tensor)
        chunks = (request.data async for request in requests)
        await self._uploads.receive(caller().user, first.tensor, chunks)
        return pb.UploadTensorResponse()

    async def WatchSession(
        self, request: pb.WatchSessionRequest, context: Context
    ) -> AsyncIterator[pb.WatchSessionResponse]:
        """Streams a session's events."""
        log = await self._own_log(request.session_id)
        self._dispatcher.watchers.join(log.session_id)
        try:
            async for event in log.follow(request.after_sequence):
                response = pb.WatchSessionResponse(event=event)
                if event.kind in TERMINAL_KINDS and request.max_result_bytes:
                    response.result.extend(await self._small_result(log, request.max_result_bytes))
                yield response
        finally:
            self._dispatcher.watchers.leave(log.session_id)

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        """Tells a session's state."""
        log = await self._own_log(request.session_id)
        return pb.GetSessionResponse(event=log.state)

    async def FetchResult(
        self, request: pb.FetchResultRequest, context: Context
    ) -> AsyncIterator[pb.FetchResultResponse]:
        """Streams a session's saved values."""
        log = await self._own_log(request.session_id)
        if not log.has_ended and not request.is_partial:
            raise _result_not_found(
                log, "it has not ended; watch it until it has, or ask for a partial result"
            )
        stored = await self._stored(log)
        async for response in self._result(log, stored, request):
            yield response

    async def _stored(self, log: EventLog) -> list[StoredValue]:
        has_completed = _completed(log.last)
        return await self._results.list_values(log.session_id, has_completed=has_completed)

    async def _small_result(self, log: EventLog, max_bytes: int) -> list[pb.FetchResultResponse]:
        """Gives what a session saved, if it is little; what is wrong with it, fetching it tells."""
        request = pb.FetchResultRequest(is_partial=True, may_batch=True)
        try:
            stored = await self._stored(log)
            size = sum(value.header.ByteSize() + value.header.num_bytes for value in stored)
            if not stored or size > min(max_bytes, CHUNK_BYTES):
                return []
            return [response async for response in self._result(log, stored, request)]
        except (Error, OSError):
            return []

    async def _result(
        self, log: EventLog, stored: Sequence[StoredValue], request: pb.FetchResultRequest
    ) -> AsyncIterator[pb.FetchResultResponse]:
        values = _select(log, stored, request)
        summary = pb.ResultSummary(
            num_values=len(values), num_bytes=sum(value.header.num_bytes for value in values)
        )
        yield pb.FetchResultResponse(summary=summary)
        left = values[request.num_values_received :]
        received = request.num_bytes_received
        if received > (left[0].header.num_bytes if left else 0):
            raise _result_not_found(log, f"its next value has no {received:,} bytes")
        async for parts in self._results.read(log.session_id, left, num_received=received):
            self._metrics.downloaded(sum(len(part) for part in parts if isinstance(part, bytes)))
            for response in together(map(_part, parts), may_batch=request.may_batch):
                yield response

    async def CancelSession(
        self, request: pb.CancelSessionRequest, context: Context
    ) -> pb.CancelSessionResponse:
        """Cancels a session."""
        log = await self._own_log(request.session_id, admin_too=True)
        had_ended = log.is_closing
        await self._dispatcher.cancel(log.session_id)
        return pb.CancelSessionResponse(had_ended=had_ended)

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """Lists the caller's sessions, or those of all."""
        if request.all_users:
            check_admin("listing the sessions of all users")
        user = None if request.all_users else caller().user
        size = min(request.page_size or _PAGE_SIZE, _MAX_PAGE_SIZE)
        after = SessionId(request.page_token) if request.page_token else None
        rows = await self._book.list_sessions(user, limit=size + 1, after=after)
        token = rows[size - 1].session_id if len(rows) > size else ""
        summaries = [_summary(row) for row in rows[:size]]
        return pb.ListSessionsResponse(sessions=summaries, next_page_token=token)

    async def ReleaseKeptValue(
        self, request: pb.ReleaseKeptValueRequest, context: Context
    ) -> pb.ReleaseKeptValueResponse:
        """Lets go of a value that one of the caller's sessions kept."""
        had_value = await self._dispatcher.release_kept(caller().user, request.handle_id)
        return pb.ReleaseKeptValueResponse(had_value=had_value)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Lists the models that are served and that the caller may use."""
        replicas = sorted(self._registry.replicas().items())
        models = [
            pb.ServedModel(name=name, num_replicas=count)
            for name, count in replicas
            if caller().may_use(name)
        ]
        return pb.ListModelsResponse(models=models)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describes a model's structure."""
        check_model(request.name)
        return pb.GetModelResponse(description=self._catalog.find(request.name).description)

    async def DownloadTokenizer(
        self, request: pb.DownloadTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.DownloadTokenizerResponse]:
        """Streams the files of a model's tokenizer."""
        check_model(request.name)
        for file in self._catalog.find(request.name).tokenizer_files:
            for start in range(0, max(len(file.content), 1), CHUNK_BYTES):
                data = file.content[start : start + CHUNK_BYTES]
                yield pb.DownloadTokenizerResponse(file_name=file.name, data=data)

    async def GetServerState(
        self, request: pb.GetServerStateRequest, context: Context
    ) -> pb.GetServerStateResponse:
        """Tells the server's version, limits, shard groups and queues."""
        key = caller()
        models = [model for model in self._catalog.served() if key.may_use(model)]
        return pb.GetServerStateResponse(
            version=self._version,
            operations_version=OPERATIONS_VERSION,
            max_session_bytes=self._max_session_bytes,
            groups=[_group_state(group) for group in self._registry if group.model in models],
            queues=[self._dispatcher.queue_state(model) for model in models],
            is_draining=self._dispatcher.intake.is_draining,
            user=key.user,
            hosts=list(self._dispatcher.hosting.states(key.may_use)),
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Sends groups, or the whole scheduler, nothing new."""
        check_admin("draining")
        if not request.group_ids:
            self._dispatcher.intake.is_draining = not request.undo
            return pb.DrainResponse()
        if request.undo:
            raise malformed("a shard group drains for good; start another in its place")
        groups = [self._group(name) for name in request.group_ids]
        for group in groups:
            self._dispatcher.drain(group)
        return pb.DrainResponse(group_ids=[group.group_id for group in groups])

    def _group(self, name: str) -> Group:
        found = [group for group in self._registry if group.group_id.startswith(name)]
        if len(found) != 1:
            raise malformed(
                f"{len(found)} shard groups have an id that begins with {name[:80]!r}; "
                "`insitu status` shows the ids",
                groupId=name[:80],
            )
        return found[0]

    async def _own_log(self, session_id: str, *, admin_too: bool = False) -> EventLog:
        """Gives the events of a session of the caller's own, or of anybody's to administrators."""
        log = await self._book.find(SessionId(session_id))
        if log.user != caller().user and not (admin_too and caller().is_admin):
            raise error(
                Reason.PERMISSION_DENIED,
                f"session {log.session_id} is another user's; use the API key that submitted it",
                sessionId=log.session_id,
            )
        return log


def _part(part: SavedValue | bytes) -> pb.FetchResultResponse:
    if isinstance(part, bytes):
        return pb.FetchResultResponse(data=part)
    return pb.FetchResultResponse(saved_value=part)


def _select(
    log: EventLog, stored: Sequence[StoredValue], request: pb.FetchResultRequest
) -> list[StoredValue]:
    """Picks the values that were asked for; all, if none was."""
    node_ids = request.node_ids
    saved = {value.header.node_id for value in stored}
    if missing := [node_id for node_id in node_ids if node_id not in saved]:
        raise _result_not_found(log, f"it saved nothing under node {missing[0]}")
    if not stored and not request.is_partial and not _completed(log.last):
        raise _result_not_found(log, "it ended before it had saved anything")
    return [value for value in stored if not node_ids or value.header.node_id in node_ids]


def _traceparent(context: Context) -> str:
    found = dict(context.invocation_metadata() or ()).get(METADATA_KEY, "")
    return found[:_MAX_TRACEPARENT] if isinstance(found, str) else ""


def _completed(event: Event) -> bool:
    return event.kind == EventKind.EVENT_KIND_COMPLETED


def _result_not_found(log: EventLog, problem: str) -> Error:
    return error(
        Reason.RESULT_NOT_FOUND,
        f"session {log.session_id} has no such result: {problem}",
        sessionId=log.session_id,
    )


def _group_state(group: Group) -> pb.GroupState:
    return pb.GroupState(
        group=ShardGroup(
            group_id=group.group_id,
            model=group.model,
            address=group.address,
            num_ranks=group.num_ranks,
            max_sessions=group.max_sessions,
            host_id=group.host_id,
        ),
        state=ShardGroupState.Value(f"SHARD_GROUP_STATE_{group.state.value}"),
        num_sessions=group.num_sessions,
    )


def _summary(row: SessionRow) -> pb.SessionSummary:
    summary = pb.SessionSummary(
        session_id=row.session_id,
        model=row.model or "",
        state=EventKind.Value(f"EVENT_KIND_{row.state}"),
        user=row.user,
    )
    # The journal's times are UTC, and SQLite does not say so.
    summary.created_at.FromDatetime(row.created_at)
    if row.finished_at is not None:
        summary.finished_at.FromDatetime(row.finished_at)
    return summary

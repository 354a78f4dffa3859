"""Runs sessions on a server."""

from __future__ import annotations

import datetime
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from insitu._names import saves
from insitu.backends._connection import Connection
from insitu.backends._download import download
from insitu.backends._patience import with_patience
from insitu.backends._resuming import MAX_STREAM_SECONDS, Resuming
from insitu.backends._tokenizer import cached_tokenizer
from insitu.backends._upload import name_contents, upload_missing
from insitu.backends._watch import Watch
from insitu_proto.v1 import scheduler_service_pb2
from insitu_wire.batching import apart
from insitu_wire.errors import Error, Reason, SessionStateError, UnavailableError, error
from insitu_wire.limits import MAX_SESSION_BYTES
from insitu_wire.tracing import METADATA_KEY, Tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from insitu._config import Config
    from insitu.backends import OnTokens
    from insitu.backends._download import Received
    from insitu_proto.v1 import event_pb2, model_pb2, session_pb2

_TRACING = Tracing("insitu-client")
_TIMEOUT_SECONDS = 30.0
_MAX_UPLOADS = 5
_SMALL_RESULT_BYTES = 64 * 1024


class RemoteBackend:
    """Runs sessions on the server that the configuration names."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._connection = Connection(config)

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Asks the server for a model's structure."""
        request = scheduler_service_pb2.GetModelRequest(name=model)

        def ask() -> model_pb2.ModelDescription:
            with self._connection.call() as (stub, metadata):
                response = stub.GetModel(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
                return response.description

        return with_patience(ask, seconds=self._config.submit_wait_seconds)

    def tokenizer_folder(self, description: model_pb2.ModelDescription) -> Path:
        """Gives the folder of the tokenizer's files, downloading them once."""

        def fetch() -> Iterator[scheduler_service_pb2.DownloadTokenizerResponse]:
            request = scheduler_service_pb2.DownloadTokenizerRequest(name=description.name)
            with self._connection.call() as (stub, metadata):
                yield from stub.DownloadTokenizer(request, metadata=metadata)

        return cached_tokenizer(description, fetch)

    def run(
        self,
        session: session_pb2.Session,
        tensors: Mapping[int, torch.Tensor],
        others: Sequence[object] = (),
        on_tokens: OnTokens | None = None,
        *,
        deadline: float | None = None,
    ) -> Iterator[tuple[int, object]]:
        """Submits a session, shows its events, and yields what it saved."""
        with _TRACING.span("insitu.session") as traceparent:
            session_id = self.submit(session, tensors, deadline=deadline, traceparent=traceparent)
            yield from self._to_end(session_id, session, on_tokens)

    def _to_end(
        self, session_id: str, session: session_pb2.Session, on_tokens: OnTokens | None
    ) -> Iterator[tuple[int, object]]:
        try:
            watch = self.watch(session_id)
            failure = watch.to_end(on_tokens=on_tokens)
            if any(saves(session.steps)):
                is_partial = failure is not None
                for received in self.fetch(session_id, is_partial=is_partial, come=watch.result):
                    yield received.node_id, received.value
        except BaseException:
            # Ctrl-C too: nobody would use what the session still does.
            with suppress(Error):
                self.cancel(session_id, timeout=2.0)
            raise
        if failure is not None:
            raise failure

    def submit(
        self,
        session: session_pb2.Session,
        tensors: Mapping[int, torch.Tensor],
        *,
        is_detached: bool = False,
        deadline: float | None = None,
        traceparent: str = "",
    ) -> str:
        """Hands a session in and gives its id; its tensors follow once the rest was found right.

        Args:
            session: what to run.
            tensors: those of its list whose elements are not inside it, by their place.
            is_detached: whether it goes on when nobody watches it.
            deadline: how long after its acceptance it may end at the latest, in seconds; None for
                as long as it takes.
            traceparent: names the span that it is a part of.
        """
        name_contents(session, tensors)
        _check_size(session)
        request = scheduler_service_pb2.SubmitSessionRequest(
            request_id=str(uuid.uuid4()),
            session=session,
            is_detached=is_detached,
            tier=_tier(self._config.tier),
        )
        if deadline is not None:
            request.deadline.FromTimedelta(datetime.timedelta(seconds=deadline))
        with _TRACING.span("insitu.submit", traceparent) as span:
            return with_patience(
                lambda: self._insist(lambda: self._submit(request, tensors, span)),
                seconds=self._config.submit_wait_seconds,
            )

    def _insist(self, attempt: Callable[[], str]) -> str:
        """Tries again for a minute where a server was that does not answer now.

        It may have accepted the session before it died: under the same request id that is the same.
        """
        resuming = Resuming()
        while True:
            try:
                return attempt()
            except UnavailableError as err:
                may_be_back = err.reason is Reason.SERVER_UNREACHABLE
                if not (may_be_back and self._connection.has_answered):
                    raise
                resuming.broke(err)

    def _submit(
        self,
        request: scheduler_service_pb2.SubmitSessionRequest,
        tensors: Mapping[int, torch.Tensor],
        traceparent: str,
    ) -> str:
        spans = ((METADATA_KEY, traceparent),) if traceparent else ()
        num_uploads = 0
        while True:
            try:
                with self._connection.call() as (stub, metadata):
                    answer = stub.SubmitSession(request, metadata=(*metadata, *spans))
                    return answer.session_id
            except SessionStateError as err:
                if err.reason is not Reason.TENSOR_NOT_UPLOADED or num_uploads == _MAX_UPLOADS:
                    raise
            # Again if they had to make room for others before the session came.
            with self._connection.call() as (stub, metadata):
                upload_missing(stub, metadata, request.session, tensors)
            num_uploads += 1

    def watch(self, session_id: str) -> Watch:
        """Gives what shows a session's events, and waits for its end."""
        return Watch(self, session_id)

    def events(
        self, session_id: str, *, after: int, timeout: float
    ) -> Iterator[scheduler_service_pb2.WatchSessionResponse]:
        """Yields a session's events after a number, as they come; the stream may break.

        What the session saved comes with the last of them, if it is little.
        """
        request = scheduler_service_pb2.WatchSessionRequest(
            session_id=session_id, after_sequence=after, max_result_bytes=_SMALL_RESULT_BYTES
        )
        with self._connection.call() as (stub, metadata):
            yield from stub.WatchSession(request, metadata=metadata, timeout=timeout)

    def state(self, session_id: str) -> event_pb2.Event:
        """Gives the event that tells a session's state, without waiting."""
        request = scheduler_service_pb2.GetSessionRequest(session_id=session_id)
        with self._connection.call() as (stub, metadata):
            response = stub.GetSession(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
            return response.event

    def fetch(
        self,
        session_id: str,
        *,
        is_partial: bool,
        come: Sequence[scheduler_service_pb2.FetchResultResponse] = (),
    ) -> Iterator[Received]:
        """Downloads what a session saved.

        Args:
            session_id: the session.
            is_partial: whether it may have failed, or not have ended; then what its finished traces
                saved is given.
            come: what has come of it with its last event; empty if nothing.
        """

        def fetch(
            num_values: int, num_bytes: int
        ) -> Iterator[scheduler_service_pb2.FetchResultResponse]:
            if come:
                for response in come:
                    yield from apart(response)
                return
            request = scheduler_service_pb2.FetchResultRequest(
                session_id=session_id,
                is_partial=is_partial,
                num_values_received=num_values,
                num_bytes_received=num_bytes,
                may_batch=True,
            )
            with self._connection.call() as (stub, metadata):
                answers = stub.FetchResult(request, metadata=metadata, timeout=MAX_STREAM_SECONDS)
                for response in answers:
                    yield from apart(response)

        return download(fetch)

    def sessions(
        self, limit: int, *, all_users: bool = False
    ) -> Iterator[scheduler_service_pb2.SessionSummary]:
        """Yields the user's sessions, or for administrators those of all, the newest first."""
        token, left = "", limit
        while left > 0:
            request = scheduler_service_pb2.ListSessionsRequest(
                page_size=left, page_token=token, all_users=all_users
            )
            with self._connection.call() as (stub, metadata):
                answer = stub.ListSessions(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
            yield from answer.sessions
            token, left = answer.next_page_token, left - len(answer.sessions)
            if not token:
                return

    def release_handle(self, handle_id: str) -> None:
        """Lets go of a value that a session kept."""
        request = scheduler_service_pb2.ReleaseKeptValueRequest(handle_id=handle_id)
        with self._connection.call() as (stub, metadata):
            stub.ReleaseKeptValue(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)

    def cancel(self, session_id: str, *, timeout: float = _TIMEOUT_SECONDS) -> None:
        """Cancels a session; one that has ended stays as it is."""
        request = scheduler_service_pb2.CancelSessionRequest(session_id=session_id)
        with self._connection.call() as (stub, metadata):
            stub.CancelSession(request, metadata=metadata, timeout=timeout)

    def drain(self, group_ids: Sequence[str], *, undo: bool = False) -> list[str]:
        """Has groups, or the whole server, be sent nothing new; gives the ids of the groups."""
        request = scheduler_service_pb2.DrainRequest(group_ids=group_ids, undo=undo)
        with self._connection.call() as (stub, metadata):
            answer = stub.Drain(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
            return list(answer.group_ids)

    def server_state(self) -> scheduler_service_pb2.GetServerStateResponse:
        """Asks for the server's models, groups and queues."""
        with self._connection.call() as (stub, metadata):
            return stub.GetServerState(
                scheduler_service_pb2.GetServerStateRequest(),
                metadata=metadata,
                timeout=_TIMEOUT_SECONDS,
            )

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


def _tier(name: str) -> scheduler_service_pb2.Tier.ValueType:
    return scheduler_service_pb2.Tier.Value(f"TIER_{name.upper() or 'UNSPECIFIED'}")


def _check_size(session: session_pb2.Session) -> None:
    if (size := session.ByteSize()) > MAX_SESSION_BYTES:
        raise error(
            Reason.REQUEST_TOO_LARGE,
            f"the session takes {size:,} bytes and a server takes at most {MAX_SESSION_BYTES:,}; "
            "bring fewer or smaller tensors",
            sessionBytes=size,
            maxBytes=MAX_SESSION_BYTES,
        )

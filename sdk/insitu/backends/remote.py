"""Runs sessions on a server."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import grpc

from insitu._logging import log_event
from insitu.backends._download import download
from insitu.backends._tokenizer import cached_tokenizer
from insitu_proto.v1 import event_pb2, scheduler_service_pb2, scheduler_service_pb2_grpc
from insitu_wire.errors import Error, Reason, UnavailableError, error, from_failure, from_rpc_error
from insitu_wire.limits import API_KEY_METADATA, CHANNEL_OPTIONS, MAX_SESSION_BYTES
from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from insitu._config import Config
    from insitu_proto.v1 import model_pb2, session_pb2
    from insitu_proto.v1.scheduler_service_pb2_grpc import SchedulerServiceStub

_TIMEOUT_SECONDS = 30.0
_MAX_RESUMES = 8
# Every unary call is idempotent, so gRPC itself repeats what no server answered.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "insitu.v1.SchedulerService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class RemoteBackend:
    """Runs sessions on the server that the configuration names."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._endpoint = ""
        self._channel: grpc.Channel | None = None

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Asks the server for a model's structure."""
        request = scheduler_service_pb2.GetModelRequest(name=model)
        with self._call() as (stub, metadata):
            response = stub.GetModel(request, metadata=metadata, timeout=_TIMEOUT_SECONDS)
            return response.description

    def tokenizer_folder(self, description: model_pb2.ModelDescription) -> Path:
        """Gives the folder of the tokenizer's files, downloading them once."""

        def fetch() -> Iterator[scheduler_service_pb2.DownloadTokenizerResponse]:
            request = scheduler_service_pb2.DownloadTokenizerRequest(name=description.name)
            with self._call() as (stub, metadata):
                yield from stub.DownloadTokenizer(request, metadata=metadata)

        return cached_tokenizer(description, fetch)

    def run(self, session: session_pb2.Session) -> Iterator[tuple[int, object]]:
        """Submits a session, shows its events, and yields what it saved."""
        session_id = self._submit(session)
        try:
            failure = self._watch(session_id)
            if _saves_something(session):
                yield from self._fetch(session_id, failure)
        except BaseException:
            # Ctrl-C too: nobody would use what the session still does.
            self._cancel(session_id)
            raise
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Closes the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def server_state(self) -> scheduler_service_pb2.GetServerStateResponse:
        """Asks for the server's models, groups and queues."""
        with self._call() as (stub, metadata):
            return stub.GetServerState(
                scheduler_service_pb2.GetServerStateRequest(),
                metadata=metadata,
                timeout=_TIMEOUT_SECONDS,
            )

    def _submit(self, session: session_pb2.Session) -> str:
        _check_size(session)
        request = scheduler_service_pb2.SubmitSessionRequest(
            request_id=str(uuid.uuid4()), session=session
        )
        with self._call() as (stub, metadata):
            return stub.SubmitSession(request, metadata=metadata).session_id

    def _watch(self, session_id: str) -> Error | None:
        """Shows a session's events to its end; gives why it failed, if it did."""
        seen = 0
        for attempt in range(_MAX_RESUMES):
            try:
                for event in self._events(session_id, seen):
                    seen = event.sequence
                    log_event(session_id, _kind_name(event), event.message)
                    if event.kind == event_pb2.EVENT_KIND_COMPLETED:
                        return None
                    if event.kind == event_pb2.EVENT_KIND_ERROR:
                        return from_failure(event.failure)
                    if event.kind == event_pb2.EVENT_KIND_CANCELLED:
                        return _cancelled(session_id)
            except UnavailableError:
                if attempt == _MAX_RESUMES - 1:
                    raise
            time.sleep(min(0.1 * 2**attempt, 5.0))
        raise error(
            Reason.SERVER_UNREACHABLE,
            f"the server at {self._endpoint} keeps closing the stream of session {session_id}",
            address=self._endpoint,
        )

    def _events(self, session_id: str, after: int) -> Iterator[event_pb2.Event]:
        request = scheduler_service_pb2.WatchSessionRequest(
            session_id=session_id, after_sequence=after
        )
        with self._call() as (stub, metadata):
            for response in stub.WatchSession(request, metadata=metadata):
                yield response.event

    def _fetch(self, session_id: str, failure: Error | None) -> Iterator[tuple[int, object]]:
        request = scheduler_service_pb2.FetchResultRequest(session_id=session_id)
        try:
            with self._call() as (stub, metadata):
                yield from download(stub.FetchResult(request, metadata=metadata))
        except Error as err:
            # A failed session may have saved nothing before it failed.
            if failure is None or err.reason is not Reason.RESULT_NOT_FOUND:
                raise

    def _cancel(self, session_id: str) -> None:
        request = scheduler_service_pb2.CancelSessionRequest(session_id=session_id)
        with suppress(Error), self._call() as (stub, metadata):
            stub.CancelSession(request, metadata=metadata, timeout=2.0)

    @contextmanager
    def _call(self) -> Iterator[tuple[SchedulerServiceStub, tuple[tuple[str, str], ...]]]:
        """Gives the stub and the metadata of a call, and translates its errors."""
        if not self._config.api_key:
            raise error(
                Reason.MISSING_CREDENTIAL,
                "no API key is set: use CONFIG.set_default_api_key(...) or the variable "
                "INSITU_API_KEY",
            )
        try:
            yield self._stub(), ((API_KEY_METADATA, self._config.api_key),)
        except grpc.RpcError as rpc_error:
            # Every error that a stub raises is also the call that failed.
            call = cast("grpc.Call", rpc_error)
            raise from_rpc_error(call, address=self._endpoint) from None

    def _stub(self) -> SchedulerServiceStub:
        if self._channel is None or self._endpoint != self._config.endpoint:
            self.close()
            self._endpoint = self._config.endpoint
            options = (*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(_SERVICE_CONFIG)))
            self._channel = grpc.insecure_channel(self._endpoint, options=options)
        return scheduler_service_pb2_grpc.SchedulerServiceStub(self._channel)


def _check_size(session: session_pb2.Session) -> None:
    if (size := session.ByteSize()) > MAX_SESSION_BYTES:
        raise error(
            Reason.REQUEST_TOO_LARGE,
            f"the session takes {size:,} bytes and a server takes at most {MAX_SESSION_BYTES:,}; "
            "bring fewer or smaller tensors",
            sessionBytes=size,
            maxBytes=MAX_SESSION_BYTES,
        )


def _saves_something(session: session_pb2.Session) -> bool:
    return any(
        node.HasField("save")
        for step in all_steps(session.steps)
        for node in (*step.trace.nodes, *step.compute.nodes)
    )


def _kind_name(event: event_pb2.Event) -> str:
    return event_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")


def _cancelled(session_id: str) -> Error:
    return error(
        Reason.SESSION_CANCELLED, f"session {session_id} was cancelled", sessionId=session_id
    )

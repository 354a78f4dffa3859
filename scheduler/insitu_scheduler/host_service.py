"""The scheduler's gRPC service for hosts: what they can load, and what they are to have loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import host_service_pb2_grpc
from insitu_proto.v1.host_service_pb2 import (
    HostedModelState,
    RegisterHostRequest,
    RegisterHostResponse,
)
from insitu_scheduler.model_life import Host
from insitu_scheduler.models import KnownModel, TokenizerFile
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from insitu_proto.v1.host_service_pb2 import HostReport
    from insitu_proto.v1.model_pb2 import ModelDescription
    from insitu_scheduler.dispatch import Dispatcher
    from insitu_scheduler.hosting import Hosting
    from insitu_scheduler.models import ModelCatalog

    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)

# Hosts report every few seconds.
_SILENT_SECONDS = 30.0

_UNLOADED = (
    HostedModelState.HOSTED_MODEL_STATE_UNLOADED,
    HostedModelState.HOSTED_MODEL_STATE_UNLOADING,
)


class HostServicer(host_service_pb2_grpc.HostServiceServicer):
    """Takes hosts in, and orders them what to load."""

    def __init__(self, hosting: Hosting, catalog: ModelCatalog, dispatcher: Dispatcher) -> None:
        self._hosting = hosting
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._stopping = asyncio.Event()

    async def RegisterHost(
        self, request_iterator: AsyncIterator[RegisterHostRequest], context: Context
    ) -> AsyncIterator[RegisterHostResponse]:
        """Registers a host for as long as the stream lives."""
        self._dispatcher.intake.check_open()
        host = await self._admit(request_iterator)
        orders: asyncio.Queue[frozenset[str] | None] = asyncio.Queue()
        ending = [
            asyncio.create_task(self._hear(host.host_id, request_iterator)),
            asyncio.create_task(self._stopping.wait()),
        ]
        for task in ending:
            task.add_done_callback(lambda _: orders.put_nowait(None))
        # What it has loaded already, if it was registered before, it keeps for now.
        orders.put_nowait(frozenset(host.loaded))
        self._hosting.add(host, orders.put_nowait)
        _log.info("host %s can load %s", host.host_id, ", ".join(host.models))
        try:
            self._dispatcher.hosts_changed()
            while (models := await orders.get()) is not None:
                yield RegisterHostResponse(models=sorted(models))
        finally:
            self._hosting.remove(host.host_id)
            for task in ending:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            _log.info("host %s is out", host.host_id)
        if self._stopping.is_set():
            raise error(Reason.SHUTTING_DOWN, "the scheduler is stopping; register again later")

    def stop(self) -> None:
        """Ends all registrations."""
        self._stopping.set()

    async def _admit(self, requests: AsyncIterator[RegisterHostRequest]) -> Host:
        """Learns a host's models."""
        first = await anext(requests, RegisterHostRequest())
        message = first.host
        if not (message.host_id and message.max_loaded):
            raise _out_of_order("begins with a host that has an id and room for a model")
        described: list[tuple[ModelDescription, dict[str, list[bytes]]]] = []
        async for request in requests:
            match request.WhichOneof("kind"):
                case "model":
                    described.append((request.model, {}))
                case "tokenizer" if described:
                    part = request.tokenizer
                    described[-1][1].setdefault(part.file_name, []).append(part.data)
                case "report":
                    self._learn(described)
                    return _host(message.host_id, message.max_loaded, described, request.report)
                case _:
                    break
        raise _out_of_order("has its models after the host, and then a report")

    def _learn(self, described: list[tuple[ModelDescription, dict[str, list[bytes]]]]) -> None:
        for description, parts in described:
            files = tuple(TokenizerFile(name, b"".join(data)) for name, data in parts.items())
            self._catalog.add(KnownModel.from_description(description, files))

    async def _hear(self, host_id: str, requests: AsyncIterator[RegisterHostRequest]) -> None:
        """Takes in what a host tells, until it says no more, or nothing for too long."""
        with suppress(TimeoutError, StopAsyncIteration):
            while True:
                async with asyncio.timeout(_SILENT_SECONDS):
                    request = await anext(requests)
                self._hosting.report(host_id, request.report)
                self._dispatcher.hosts_changed()


def _host(
    host_id: str,
    max_loaded: int,
    described: list[tuple[ModelDescription, dict[str, list[bytes]]]],
    report: HostReport,
) -> Host:
    now = time.monotonic()
    loaded = {entry.model: now for entry in report.models if entry.state not in _UNLOADED}
    models = tuple(description.name for description, _ in described)
    return Host(host_id, models, max_loaded, loaded)


def _out_of_order(rule: str) -> Exception:
    return error(Reason.MALFORMED_SESSION, f"a registration of a host {rule}")

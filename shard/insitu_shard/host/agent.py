"""Keeps a host registered with the scheduler, and does what this orders."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc

from insitu_proto.v1 import host_service_pb2, host_service_pb2_grpc
from insitu_wire.callers import carrying
from insitu_wire.limits import JOIN_TOKEN_METADATA
from insitu_wire.tls import SCHEDULER_NAME, Tls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_shard.host.groups import HostedGroups

_log = logging.getLogger(__name__)

_STEP_SECONDS = 0.2
_REPORT_SECONDS = 2.0
_FIRST_RETRY_SECONDS = 0.2
_LAST_RETRY_SECONDS = 5.0
_NO_TLS = Tls()


class HostAgent:
    """A stream to the scheduler, opened again whenever it breaks; groups go on meanwhile."""

    def __init__(
        self,
        scheduler: str,
        host: host_service_pb2.Host,
        descriptions: Sequence[host_service_pb2.RegisterHostRequest],
        groups: HostedGroups,
        *,
        join_token: str = "",
        tls: Tls = _NO_TLS,
    ) -> None:
        """Makes it.

        Args:
            scheduler: host:port of the scheduler.
            host: what to register.
            descriptions: the messages that describe its models.
            groups: what is started and ended.
            join_token: what the scheduler wants of those that register.
            tls: how the host shows who it is.
        """
        self._join_token = join_token
        self._tls = tls
        self._scheduler = scheduler
        self._host = host
        self._descriptions = descriptions
        self._groups = groups

    async def run(self, stopping: asyncio.Event) -> None:
        """Does what the scheduler orders, until it is told to stop."""
        registering = asyncio.create_task(self._stay_registered())
        try:
            while not stopping.is_set():
                self._groups.step()
                await asyncio.sleep(_STEP_SECONDS)
        finally:
            registering.cancel()
            self._groups.stop()

    async def _stay_registered(self) -> None:
        delay = _FIRST_RETRY_SECONDS
        while True:
            try:
                async with self._tls.channel(self._scheduler, SCHEDULER_NAME) as channel:
                    stub = host_service_pb2_grpc.HostServiceStub(
                        carrying(channel, JOIN_TOKEN_METADATA, self._join_token)
                    )
                    await self._register(stub.RegisterHost())
                    delay = _FIRST_RETRY_SECONDS
            except grpc.aio.AioRpcError as rpc_error:
                _log.warning(
                    "the scheduler at %s does not keep us registered: %s; trying again in %.1f s",
                    self._scheduler, rpc_error.details(), delay,
                )  # fmt: skip
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LAST_RETRY_SECONDS)

    async def _register(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        await call.write(host_service_pb2.RegisterHostRequest(host=self._host))
        for message in self._descriptions:
            await call.write(message)
        await self._report(call)
        reporting = asyncio.create_task(self._keep_reporting(call))
        try:
            async for response in call:
                self._groups.wanted = frozenset(response.models)
        finally:
            reporting.cancel()

    async def _keep_reporting(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            await self._report(call)

    async def _report(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        report = self._groups.report()
        await call.write(host_service_pb2.RegisterHostRequest(report=report))

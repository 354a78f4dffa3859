"""Keeps the group registered with the scheduler for as long as it serves."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc

from insitu_proto.v1 import placement_pb2, registry_service_pb2, registry_service_pb2_grpc
from insitu_wire.callers import carrying
from insitu_wire.limits import JOIN_TOKEN_METADATA
from insitu_wire.tls import SCHEDULER_NAME, Tls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.2
_LAST_RETRY_SECONDS = 5.0
_DRAIN_SECONDS = 0.3
_NO_TLS = Tls()


class Registration:
    """A stream to the scheduler, opened again whenever it breaks."""

    def __init__(
        self,
        scheduler: str,
        group: placement_pb2.ShardGroup,
        on_lost: Callable[[], Awaitable[object]],
        *,
        access_token: str = "",
        on_epoch: Callable[[int], None] = lambda epoch: None,
        join_token: str = "",
        tls: Tls = _NO_TLS,
    ) -> None:
        """Makes it.

        Args:
            scheduler: host:port of the scheduler.
            group: what to register.
            on_lost: called when the stream has broken, before it is opened again: nobody will ask
                any more for what sessions have here.
            access_token: what the group wants calls to carry.
            on_epoch: called with the epoch of the scheduler that has granted a lease.
            join_token: what the scheduler wants of groups that register.
            tls: how the group shows who it is.
        """
        self._access_token = access_token
        self._on_epoch = on_epoch
        self._join_token = join_token
        self._tls = tls
        self._scheduler = scheduler
        self._group = group
        self._on_lost = on_lost
        self._keep_alive_seconds = 1.0
        self._draining = asyncio.Event()
        self._drained = asyncio.Event()
        # The first request that said so, and how many requests and answers there were: each request
        # has its answer.
        self._told_in: int | None = None
        self._num_requests = 0
        self._num_answers = 0

    async def run(self) -> None:
        """Stays registered until cancelled."""
        delay = _FIRST_RETRY_SECONDS
        while True:
            try:
                async with self._tls.channel(self._scheduler, SCHEDULER_NAME) as channel:
                    stub = registry_service_pb2_grpc.RegistryServiceStub(
                        carrying(channel, JOIN_TOKEN_METADATA, self._join_token)
                    )
                    async for response in stub.RegisterGroup(self._requests()):
                        delay = _FIRST_RETRY_SECONDS
                        self._granted(response.lease)
            except grpc.aio.AioRpcError as rpc_error:
                _log.warning(
                    "the scheduler at %s does not keep us registered: %s; trying again in %.1f s",
                    self._scheduler, rpc_error.details(), delay,
                )  # fmt: skip
            await self._on_lost()
            if self._draining.is_set():
                self._drained.set()
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LAST_RETRY_SECONDS)

    async def drain(self) -> None:
        """Has the scheduler send no new session, and waits until those that it has sent have ended.

        A session may have several segments here, with others elsewhere between them: the scheduler
        alone knows whether it has ended.
        """
        self._draining.set()
        await self._drained.wait()

    def _granted(self, lease: placement_pb2.Lease) -> None:
        self._on_epoch(lease.epoch)
        self._keep_alive_seconds = lease.ttl.ToTimedelta().total_seconds() / 3
        self._num_answers += 1
        if self._told_in is None or self._num_answers < self._told_in:
            return
        if not lease.num_sessions:
            self._drained.set()

    async def _requests(self) -> AsyncIterator[registry_service_pb2.RegisterGroupRequest]:
        self._told_in, self._num_requests, self._num_answers = None, 1, 0
        yield registry_service_pb2.RegisterGroupRequest(
            group=self._group, access_token=self._access_token
        )
        while True:
            if self._draining.is_set():
                await asyncio.sleep(min(_DRAIN_SECONDS, self._keep_alive_seconds))
            else:
                await _wait(self._draining, self._keep_alive_seconds)
            is_draining = self._draining.is_set()
            self._num_requests += 1
            if is_draining and self._told_in is None:
                self._told_in = self._num_requests
            keep_alive = registry_service_pb2.KeepAlive(is_draining=is_draining)
            yield registry_service_pb2.RegisterGroupRequest(keep_alive=keep_alive)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Waits for an event, but no longer than some seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return

"""The scheduler's gRPC service for shard groups: registrations and their leases."""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import placement_pb2, registry_service_pb2_grpc
from insitu_proto.v1.registry_service_pb2 import RegisterGroupRequest, RegisterGroupResponse
from insitu_scheduler.models import KnownModel
from insitu_scheduler.registry import LeaseId
from insitu_scheduler.shards import ShardClient
from insitu_wire.errors import Reason, error
from insitu_wire.tls import Tls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from insitu_scheduler.dispatch import Dispatcher
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.models import ModelCatalog
    from insitu_scheduler.registry import Group, Registry

    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


class RegistryServicer(registry_service_pb2_grpc.RegistryServiceServicer):
    """Grants leases, and takes them away from groups that leave or fall silent."""

    def __init__(
        self,
        registry: Registry,
        catalog: ModelCatalog,
        dispatcher: Dispatcher,
        metrics: SchedulerMetrics,
        tls: Tls | None = None,
        *,
        epoch: int = 0,
    ) -> None:
        self._epoch = epoch
        self._registry = registry
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._tls = tls or Tls()
        self._stopping = asyncio.Event()
        self._expiring: asyncio.Task[None] | None = None

    async def RegisterGroup(
        self, request_iterator: AsyncIterator[RegisterGroupRequest], context: Context
    ) -> AsyncIterator[RegisterGroupResponse]:
        """Registers a group for as long as the stream lives and is kept alive."""
        requests = _until(self._stopping, request_iterator)
        first = await anext(requests, RegisterGroupRequest())
        _check_group(first)
        group = await self._admit(first.group, first.access_token)
        try:
            yield self._lease(group)
            async for request in requests:
                self._keep_alive(group, request)
                yield self._lease(group)
        finally:
            self._revoke(group, "its leader has left", "ended")
        if self._stopping.is_set():
            raise error(Reason.SHUTTING_DOWN, "the scheduler is stopping; register again later")

    def start(self) -> None:
        """Begins to watch for leases that run out."""
        self._expiring = asyncio.create_task(self._expire())

    async def stop(self) -> None:
        """Ends all registrations."""
        self._stopping.set()
        if self._expiring is not None:
            self._expiring.cancel()
            with suppress(asyncio.CancelledError):
                await self._expiring

    async def _admit(self, message: placement_pb2.ShardGroup, access_token: str) -> Group:
        """Learns the group's model and grants it a lease."""
        client = ShardClient(
            message.address, access_token=access_token, tls=self._tls, epoch=self._epoch
        )
        try:
            await self._learn(message.model, client)
            self._dispatcher.intake.check_open()
        except BaseException:
            await client.close()
            raise
        if (former := self._registry.holder(message.group_id)) is not None:
            self._revoke(former, "it registers again", "replaced")
        group = self._registry.grant(
            LeaseId(secrets.token_hex(16)),
            group_id=message.group_id,
            model=message.model,
            address=message.address,
            num_ranks=message.num_ranks,
            # Groups from before sessions ran beside each other do not tell.
            max_sessions=message.max_sessions or 1,
            handle_bytes=message.handle_bytes,
            now=time.monotonic(),
            host_id=message.host_id,
        )
        self._dispatcher.join(group, client)
        self._metrics.lease_changed(group.model, "granted")
        _log.info("shard group %s serves %s at %s", group.group_id, group.model, group.address)
        return group

    async def _learn(self, name: str, client: ShardClient) -> None:
        description = await client.describe(name)
        if description.name != name:
            raise error(
                Reason.MALFORMED_SESSION,
                f"the group registers {name!r} and describes {description.name!r}; they must agree",
            )
        files = self._catalog.tokenizer_files(description.tokenizer_hash)
        if files is None:
            files = await client.fetch_tokenizer(name)
        self._catalog.add(KnownModel.from_description(description, files))

    def _keep_alive(self, group: Group, request: RegisterGroupRequest) -> None:
        if request.WhichOneof("kind") != "keep_alive":
            raise error(
                Reason.MALFORMED_SESSION, "a registration is followed by keep_alive requests only"
            )
        is_draining = request.keep_alive.is_draining
        now = time.monotonic()
        if not self._registry.keep_alive(group.lease_id, now=now, is_draining=is_draining):
            raise error(
                Reason.REPLICA_LOST,
                f"the lease of shard group {group.group_id} is gone; register again",
                groupId=group.group_id,
            )
        self._dispatcher.heard(group)

    def _revoke(self, group: Group, why: str, event: str) -> None:
        if self._registry.revoke(group.lease_id) is not None:
            self._lost(group, why, event)

    def _lost(self, group: Group, why: str, event: str) -> None:
        self._metrics.lease_changed(group.model, event)
        _log.info("shard group %s of %s is out: %s", group.group_id, group.model, why)
        self._catalog.left(group.model)
        self._dispatcher.lose(group, why)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._registry.ttl_seconds / 4)
            for group in self._registry.expire(time.monotonic()):
                self._lost(group, "it was silent for too long", "expired")

    def _lease(self, group: Group) -> RegisterGroupResponse:
        lease = placement_pb2.Lease(
            lease_id=group.lease_id, epoch=self._epoch, num_sessions=group.num_pinned
        )
        lease.ttl.FromTimedelta(datetime.timedelta(seconds=self._registry.ttl_seconds))
        return RegisterGroupResponse(lease=lease)


def _check_group(request: RegisterGroupRequest) -> None:
    group = request.group
    if not (group.group_id and group.model and group.address):
        raise error(
            Reason.MALFORMED_SESSION,
            "a registration begins with a group that has an id, a model and an address",
        )


async def _until(
    stopping: asyncio.Event, requests: AsyncIterator[RegisterGroupRequest]
) -> AsyncIterator[RegisterGroupRequest]:
    """Yields requests until there are no more, or the server stops."""
    stopped = asyncio.ensure_future(stopping.wait())
    reading: asyncio.Future[RegisterGroupRequest | None] | None = None
    try:
        while True:
            reading = asyncio.ensure_future(_next(requests))
            await asyncio.wait({reading, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or (request := reading.result()) is None:
                return
            yield request
    finally:
        stopped.cancel()
        if reading is not None:
            reading.cancel()


async def _next(requests: AsyncIterator[RegisterGroupRequest]) -> RegisterGroupRequest | None:
    return await anext(requests, None)

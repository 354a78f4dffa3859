"""A real scheduler on a free port, a client of it, and shard groups that play scripts."""

from __future__ import annotations

import contextlib
import datetime
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1.event_pb2 import Event, EventKind
from insitu_proto.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.server import Server
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Error
from insitu_wire.limits import CHANNEL_OPTIONS
from support.fake_shard import FakeShard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from insitu_proto.v1.session_pb2 import Session


def names(events: list[Event]) -> list[str]:
    return [EventKind.Name(event.kind).removeprefix("EVENT_KIND_") for event in events]


@dataclass
class Client:
    """A client with one API key; raises the errors that users see."""

    channel: grpc.aio.Channel
    key: str = "ann-key"

    def __post_init__(self) -> None:
        self.stub: Any = SchedulerServiceStub(self.channel)
        self.metadata = (("insitu-api-key", self.key),) if self.key else ()

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self.stub, method)(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as rpc_error:
            raise from_rpc_error(rpc_error, address="the test server") from None

    async def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        call = getattr(self.stub, method)(request, metadata=self.metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as rpc_error:
            raise from_rpc_error(rpc_error, address="the test server") from None
        finally:
            call.cancel()

    async def submit(
        self,
        session: Session,
        *,
        request_id: str = "",
        is_detached: bool = False,
        deadline: float | None = None,
    ) -> str:
        request = pb.SubmitSessionRequest(
            request_id=request_id or str(uuid.uuid4()), session=session, is_detached=is_detached
        )
        if deadline is not None:
            request.deadline.FromTimedelta(datetime.timedelta(seconds=deadline))
        response = await self.call("SubmitSession", request)
        session_id: str = response.session_id
        return session_id

    async def events(self, session_id: str, after: int = 0) -> AsyncIterator[Event]:
        request = pb.WatchSessionRequest(session_id=session_id, after_sequence=after)
        async with contextlib.aclosing(self.stream("WatchSession", request)) as responses:
            async for response in responses:
                yield response.event

    async def watch(self, session_id: str, after: int = 0) -> list[Event]:
        return [event async for event in self.events(session_id, after)]

    async def watch_until(self, session_id: str, kind: str) -> list[Event]:
        """Watches to the first event of a kind, and goes away."""
        seen = []
        async with contextlib.aclosing(self.events(session_id)) as events:
            async for event in events:
                seen.append(event)
                if names(seen)[-1] == kind:
                    break
        return seen

    async def state(self, session_id: str) -> str:
        response = await self.call("GetSession", pb.GetSessionRequest(session_id=session_id))
        return names([response.event])[0]

    async def fetch(
        self, session_id: str, *node_ids: int, is_partial: bool = False
    ) -> dict[int, bytes]:
        request = pb.FetchResultRequest(
            session_id=session_id, node_ids=node_ids, is_partial=is_partial
        )
        values: dict[int, bytes] = {}
        node_id = 0
        async for response in self.stream("FetchResult", request):
            if response.HasField("saved_value"):
                node_id = response.saved_value.node_id
                values[node_id] = b""
            values |= {node_id: values[node_id] + response.data} if response.data else {}
        return values

    async def cancel_quietly(self, session_id: str) -> None:
        with contextlib.suppress(Error):
            await self.cancel(session_id)

    async def cancel(self, session_id: str) -> bool:
        request = pb.CancelSessionRequest(session_id=session_id)
        response = await self.call("CancelSession", request)
        had_ended: bool = response.had_ended
        return had_ended


@pytest.fixture
def config(tmp_path: Path) -> SchedulerConfig:
    return SchedulerConfig(
        data_dir=tmp_path,
        port=0,
        metrics_port=None,
        lease_ttl_seconds=20,
        orphan_grace_seconds=30,
        grace_seconds=1,
    )


@pytest.fixture
async def server(config: SchedulerConfig) -> AsyncIterator[Server]:
    async with Server(config) as server:
        yield server


@pytest.fixture
async def shard(server: Server) -> AsyncIterator[FakeShard]:
    async with FakeShard(server.address) as shard:
        yield await shard.ready()


@pytest.fixture
async def connect(server: Server) -> AsyncIterator[Callable[[str], Client]]:
    """Makes clients by their keys."""
    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield lambda key: Client(channel, key)


@pytest.fixture
def client(connect: Callable[[str], Client]) -> Client:
    return connect("ann-key")

"""Schedulers over one PostgreSQL journal: one leads, another stands by and takes over."""

from __future__ import annotations

import asyncio
import dataclasses
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import grpc
import pytest
import sqlalchemy as sa
from grpc_health.v1 import health_pb2, health_pb2_grpc

from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.server import Server
from insitu_shard.epochs import Epochs
from insitu_wire.errors import Error, Reason
from insitu_wire.health import LIVENESS
from support.fake_shard import FakeShard, saving
from support.ports import free_port
from support.postgres import BINARIES, MISSING, running

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(BINARIES is None, reason=MISSING)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def shared(config: SchedulerConfig, postgres: str) -> SchedulerConfig:
    return dataclasses.replace(config, journal=postgres, grace_seconds=0.1)


async def test_a_session_lives_on_with_the_scheduler_that_stood_by(
    shared: SchedulerConfig,
) -> None:
    lost = asyncio.Event()
    health_port = free_port()
    first = Server(shared, on_lost=lost.set)
    second = Server(dataclasses.replace(shared, health_port=health_port, metrics_port=0))
    await first.start()
    async with grpc.aio.insecure_channel(first.address) as channel:
        client = Client(channel)
        await _know_the_model(first, client)
        waiting = [await client.submit(saving(), is_detached=True) for _ in range(3)]
        standing_by = asyncio.create_task(second.start())
        await asyncio.sleep(1.2)
        assert not standing_by.done()
        assert second.address == ""
        assert await _health(health_port, LIVENESS) == "SERVING"
        assert await _health(health_port, "") == "NOT_SERVING"
        status, text = await _get(second, "metrics")
        assert (status, "insitu_leader_epoch 0.0" in text) == (200, True)
        status, text = await _get(second, "status")
        assert (status, "stands by" in text) == (503, True)
        _cut_connections(shared)
        async with asyncio.timeout(10):
            await lost.wait()
    assert first.is_lost
    await first.stop()
    async with asyncio.timeout(20):
        await standing_by
    try:
        assert await _health(health_port, "") == "SERVING"
        assert "insitu_leader_epoch 0.0" not in (await _get(second, "metrics"))[1]
        assert (await _get(second, "status"))[0] == 200
        async with FakeShard(second.address) as shard:
            await shard.ready()
            async with grpc.aio.insecure_channel(second.address) as channel:
                client = Client(channel)
                for session_id in waiting:
                    assert names(await client.watch(session_id))[-1] == "COMPLETED"
                    assert await client.fetch(session_id)
        assert [request.session_id for request in shard.requests] == waiting
        epochs = {dict(metadata)["insitu-epoch"] for metadata in shard.metadata}
        assert len(epochs) == 1
        assert int(epochs.pop()) >= 2
    finally:
        await second.stop()


async def test_a_scheduler_that_lost_the_lead_shows_no_event_that_the_journal_does_not_have(
    shared: SchedulerConfig,
) -> None:
    async with Server(shared) as server, grpc.aio.insecure_channel(server.address) as channel:
        client = Client(channel)
        await _know_the_model(server, client)
        session_id = await client.submit(saving(), is_detached=True)
        seen = await client.watch_until(session_id, "QUEUED")
        _cut_connections(shared)
        await client.cancel_quietly(session_id)
        with pytest.raises(Error) as caught:
            await client.watch(session_id)
        assert caught.value.reason in (Reason.SHUTTING_DOWN, Reason.INTERNAL)
    async with Server(shared) as server, grpc.aio.insecure_channel(server.address) as channel:
        client = Client(channel)
        assert await client.state(session_id) == "QUEUED"
        assert len(await client.watch_until(session_id, "QUEUED")) <= len(seen)
        await client.cancel(session_id)
        assert names(await client.watch(session_id))[-1] == "CANCELLED"


@dataclasses.dataclass
class _Call:
    epoch: str | None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.epoch is None else (("insitu-epoch", self.epoch),)


def test_a_group_refuses_orders_of_a_scheduler_that_was_replaced() -> None:
    epochs = Epochs()
    for epoch in ("1", "3", None, "3"):
        epochs.check(_Call(epoch))  # type: ignore[arg-type]
    epochs.heard(4)
    with pytest.raises(Error, match="of epoch 3, and the scheduler of epoch 4") as caught:
        epochs.check(_Call("3"))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.SCHEDULER_REPLACED


async def test_a_journal_that_can_not_be_reached_is_named_without_its_password(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, journal=f"postgresql://me:secret@/x?host={tmp_path}")
    with pytest.raises(Error, match="can not be opened") as caught:
        await Server(config).start()
    assert "secret" not in caught.value.message
    with pytest.raises(Error, match="'mysql'; it must be"):
        await Server(dataclasses.replace(config, journal="mysql://x/y")).start()


async def _health(port: int, service: str) -> str:
    """Asks as a probe of Kubernetes does."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def _get(server: Server, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(_fetch, f"http://{server.metrics_address}/{path}")


def _fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as failure:
        with failure:
            return failure.code, failure.read().decode()


async def _know_the_model(server: Server, client: Client) -> None:
    """Has a group come and go: sessions for its model wait for the next one."""
    async with FakeShard(server.address) as shard:
        await shard.ready()
    async with asyncio.timeout(20):
        while (await client.call("ListModels", pb.ListModelsRequest())).models:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _cut_connections(config: SchedulerConfig) -> None:
    """Ends all connections to the database, as the death of a machine between them would."""
    assert config.journal is not None
    url = sa.make_url(config.journal).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "WHERE locktype = 'advisory' AND granted"
            )
        )

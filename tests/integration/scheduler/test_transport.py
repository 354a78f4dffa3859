"""TLS for clients, mutual TLS between scheduler and shard groups, and the tokens of both."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import trustme

from insitu._config import Config
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1 import scheduler_service_pb2 as pb
from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_proto.v1.registry_service_pb2 import RegisterGroupRequest
from insitu_proto.v1.registry_service_pb2_grpc import RegistryServiceStub
from insitu_scheduler.server import Server
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import AuthenticationError, ConfigurationError, Error, UnavailableError
from insitu_wire.tls import SCHEDULER_NAME, SHARD_NAME, Tls
from support.fake_shard import FakeShard, saving

from .conftest import Client, names

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from insitu_scheduler.config import SchedulerConfig


@dataclass
class Authority:
    """A CA of a test, and the files that it gives to programs."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._ca = trustme.CA()
        self.roots = self.folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.roots))

    def issue(self, name: str, *names: str) -> Tls:
        issued = self._ca.issue_cert(name, *names)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return Tls(cert=cert, key=key, ca=self.roots)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture
def scheduler_tls(authority: Authority) -> Tls:
    return authority.issue(SCHEDULER_NAME, "127.0.0.1", "localhost")


@pytest.fixture
def config(config: SchedulerConfig, scheduler_tls: Tls) -> SchedulerConfig:
    return dataclasses.replace(config, tls=scheduler_tls, shard_port=0)


def secured(address: str, authority: Authority) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(authority.roots.read_bytes())
    return grpc.aio.secure_channel(address, credentials)


async def refusal(call: Awaitable[Any]) -> Error:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, address="the test server")


async def test_sessions_run_over_tls_from_the_client_to_the_shard(
    server: Server, authority: Authority
) -> None:
    shard_tls = authority.issue(SHARD_NAME)
    assert server.shard_address is not None
    async with FakeShard(server.shard_address, tls=shard_tls, access_token="t") as shard:
        await shard.ready()
        async with secured(server.address, authority) as channel:
            client = Client(channel)
            assert names(await client.watch(await client.submit(saving())))[-1] == "COMPLETED"


async def test_the_sdk_connects_with_the_roots_that_it_is_given(
    server: Server, authority: Authority, tmp_path: Path
) -> None:
    config = Config()
    config.set_default_endpoint(server.address)
    config.set_default_api_key("ann-key")
    with pytest.raises(UnavailableError):
        await asyncio.to_thread(RemoteBackend(config).server_state)
    config.set_tls_ca(Authority(tmp_path / "theirs").roots)
    with pytest.raises(UnavailableError):
        await asyncio.to_thread(RemoteBackend(config).server_state)
    config.set_tls_ca(authority.roots)
    backend = RemoteBackend(config)
    assert (await asyncio.to_thread(backend.server_state)).version
    backend.close()
    config.set_tls_ca(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="none can not be read"):
        await asyncio.to_thread(RemoteBackend(config).server_state)


async def test_a_group_without_a_certificate_of_ours_can_not_register(
    server: Server, authority: Authority, tmp_path: Path
) -> None:
    assert server.shard_address is not None
    theirs = Authority(tmp_path / "theirs").issue(SHARD_NAME)
    forged = dataclasses.replace(theirs, ca=authority.roots)
    users = authority.issue("ann.example.org")
    # At the clients' port no certificate is asked for; at the other any of ours, by its name.
    for address, tls in (
        (server.address, forged),
        (server.shard_address, forged),
        (server.shard_address, users),
    ):
        async with tls.channel(address, SCHEDULER_NAME) as channel:
            call = RegistryServiceStub(channel).RegisterGroup(iter([RegisterGroupRequest()]))
            err = await refusal(call.read())
            expected = AuthenticationError if tls is users or address == server.address else Error
            assert isinstance(err, expected)
            if expected is Error:
                assert isinstance(err, UnavailableError)


async def test_a_shard_takes_calls_of_schedulers_with_a_certificate_of_ours_alone(
    server: Server, authority: Authority, scheduler_tls: Tls
) -> None:
    assert server.shard_address is not None
    shard_tls = authority.issue(SHARD_NAME)
    async with FakeShard(server.shard_address, tls=shard_tls) as shard:
        await shard.ready()
        request = shard_service_pb2.DescribeModelRequest()
        users = authority.issue("ann.example.org")
        async with users.channel(shard.address, SHARD_NAME) as channel:
            stub = shard_service_pb2_grpc.ShardServiceStub(channel)
            assert isinstance(await refusal(stub.DescribeModel(request)), AuthenticationError)
        async with grpc.aio.insecure_channel(shard.address) as channel:
            stub = shard_service_pb2_grpc.ShardServiceStub(channel)
            assert isinstance(await refusal(stub.DescribeModel(request)), UnavailableError)
        async with scheduler_tls.channel(shard.address, SHARD_NAME) as channel:
            stub = shard_service_pb2_grpc.ShardServiceStub(channel)
            assert (await stub.DescribeModel(request)).description.name


async def test_a_certificate_that_is_replaced_is_used_without_a_restart(
    server: Server, authority: Authority, scheduler_tls: Tls, tmp_path: Path
) -> None:
    later = Authority(tmp_path / "later")
    issued = later.issue(SCHEDULER_NAME, "127.0.0.1")
    assert scheduler_tls.cert is not None
    assert scheduler_tls.key is not None
    assert issued.cert is not None
    assert issued.key is not None
    scheduler_tls.cert.write_bytes(issued.cert.read_bytes())
    scheduler_tls.key.write_bytes(issued.key.read_bytes())
    async with secured(server.address, later) as channel:
        await Client(channel).call("ListModels", pb.ListModelsRequest())


async def test_a_join_token_keeps_others_from_registering(
    config: SchedulerConfig,
) -> None:
    config = dataclasses.replace(config, tls=Tls(), shard_port=None, join_token="the-token")
    async with Server(config) as server:
        async with FakeShard(server.address, join_token="the-token", access_token="t") as shard:
            await shard.ready()
            async with grpc.aio.insecure_channel(server.address) as channel:
                for given in ((), (("insitu-join-token", "a-guess"),)):
                    call = RegistryServiceStub(channel).RegisterGroup(
                        iter([RegisterGroupRequest()]), metadata=given
                    )
                    assert isinstance(await refusal(call.read()), AuthenticationError)
                await Client(channel).watch(await Client(channel).submit(saving()))
            async with grpc.aio.insecure_channel(shard.address) as channel:
                stub = shard_service_pb2_grpc.ShardServiceStub(channel)
                for token in ("", "a-guess"):
                    metadata = (("insitu-access-token", token),) if token else ()
                    call = stub.ReleaseSession(
                        shard_service_pb2.ReleaseSessionRequest(session_id="s"), metadata=metadata
                    )
                    assert isinstance(await refusal(call), AuthenticationError)
                assert "s" not in shard.released


async def test_reflection_can_be_switched_off(config: SchedulerConfig) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    asked = reflection_pb2.ServerReflectionRequest(list_services="*")
    for is_on in (True, False):
        plain = dataclasses.replace(config, tls=Tls(), shard_port=None, has_reflection=is_on)
        async with Server(plain) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([asked]))
            if is_on:
                assert (await call.read()).list_services_response.service
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metrics_can_be_switched_off(config: SchedulerConfig) -> None:
    def listening() -> set[int]:
        found = psutil.Process().net_connections("tcp")
        return {at.laddr.port for at in found if at.status == psutil.CONN_LISTEN}

    before = listening()
    for port, num_ports in ((0, 2), (None, 1)):
        plain = dataclasses.replace(config, tls=Tls(), shard_port=None, metrics_port=port)
        async with Server(plain):
            assert len(listening() - before) == num_ports


@pytest.mark.parametrize("missing", ["cert", "key"])
def test_files_that_do_not_go_together_are_refused(scheduler_tls: Tls, missing: str) -> None:
    with pytest.raises(ConfigurationError, match=r"go together|needs"):
        dataclasses.replace(scheduler_tls, **{missing: None}).check()


def test_a_file_that_is_not_there_is_refused_by_its_name(scheduler_tls: Tls) -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere\.pem can not be read"):
        dataclasses.replace(scheduler_tls, cert=Path("/nowhere.pem")).check()

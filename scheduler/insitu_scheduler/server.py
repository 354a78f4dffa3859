"""Wires the scheduler's parts, and gives them one lifetime."""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from insitu_proto.v1 import (
    host_service_pb2,
    host_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from insitu_scheduler.admission import Admission
from insitu_scheduler.auth import Authenticator, open_keys
from insitu_scheduler.bad_attempts import BadAttempts
from insitu_scheduler.config import is_loopback
from insitu_scheduler.data_dir import DataDir
from insitu_scheduler.dispatch import Dispatcher
from insitu_scheduler.events import EventBook
from insitu_scheduler.fair_queue import FairQueue
from insitu_scheduler.gate import Gate
from insitu_scheduler.host_service import HostServicer
from insitu_scheduler.hosting import Hosting
from insitu_scheduler.housekeeping import keep_house
from insitu_scheduler.journal import Journal
from insitu_scheduler.metrics import SchedulerMetrics
from insitu_scheduler.models import ModelCatalog
from insitu_scheduler.object_store import ObjectStore
from insitu_scheduler.recovery import take_over
from insitu_scheduler.registry import Registry
from insitu_scheduler.registry_service import RegistryServicer
from insitu_scheduler.results import ResultStore
from insitu_scheduler.service import SchedulerServicer
from insitu_scheduler.uploads import UploadStore
from insitu_scheduler.web import HttpServer, StatusPage
from insitu_wire.callers import CallerCheck
from insitu_wire.health import Health
from insitu_wire.interceptor import ErrorInterceptor
from insitu_wire.limits import JOIN_TOKEN_METADATA, SERVER_OPTIONS
from insitu_wire.listening import endpoint, listen
from insitu_wire.tls import SHARD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from insitu_scheduler.config import SchedulerConfig
    from insitu_wire.tls import Tls

_log = logging.getLogger(__name__)

# Models that were asked for since then are likely to be served again.
_LATELY = datetime.timedelta(days=1)
_SHARD_SIDE_NAMES = (
    registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name,
    host_service_pb2.DESCRIPTOR.services_by_name["HostService"].full_name,
)
_SERVICE_NAMES = (
    scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name,
    *_SHARD_SIDE_NAMES,
)


class Server:
    """A scheduler that serves between start() and stop(), or inside `async with`."""

    def __init__(
        self, config: SchedulerConfig, *, on_lost: Callable[[], None] | None = None
    ) -> None:
        """Makes it.

        Args:
            config: its settings.
            on_lost: called when it can not go on, for it has lost its journal.
        """
        self._config = config
        self._on_lost = on_lost
        self.is_lost = False
        """Whether it has lost its journal, and must be stopped."""
        self._cleanup = AsyncExitStack()
        self._book: EventBook | None = None
        self._health = Health(*_SERVICE_NAMES)
        self.address = ""
        self.shard_address: str | None = None
        self.metrics_address: str | None = None

    async def start(self) -> None:
        """Starts to serve.

        Raises:
            ConfigurationError: a port, the data folder or the key file can not be used.
        """
        async with AsyncExitStack() as cleanup:
            await self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        if self._config.api_keys_file is None:
            _log.warning(
                "no key file is given: any non-empty API key is accepted, on loopback only"
            )
        self._warn_of_what_others_reach()
        _log.info("insitu scheduler is listening at %s", self.address)
        if self.metrics_address:
            _log.info("its status is shown at http://%s/status", self.metrics_address)

    async def stop(self) -> None:
        """Refuses what is new, lets end what runs within the grace, and gives up everything."""
        await self._cleanup.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    def _warn_of_what_others_reach(self) -> None:
        config = self._config
        if is_loopback(config.host):
            return
        if not config.tls.is_on:
            _log.warning("without --tls-cert API keys and sessions cross the network in the clear")
        if not config.join_token and not config.tls.is_mutual:
            _log.warning(
                "without INSITU_JOIN_TOKEN or --tls-client-ca whoever reaches %s can register as a "
                "shard group",
                self.address,
            )

    async def _start(self, cleanup: AsyncExitStack) -> None:
        """Starts the parts; each is stopped in the reverse order."""
        config = self._config
        keys = open_keys(config.api_keys_file, config.operator_key_sha256)
        await self._health.start(config.host, config.health_port)
        cleanup.push_async_callback(self._health.stop)
        version = importlib.metadata.version("insitu")
        metrics = SchedulerMetrics(version)
        http_server = await self._start_http(cleanup, metrics)
        data_dir, journal = await self._open_journal(cleanup, metrics)
        self._book = book = EventBook(journal)
        registry = Registry(ttl_seconds=config.lease_ttl_seconds)
        queue = FairQueue(
            max_wait_seconds=config.max_wait_seconds, quantum_seconds=config.quantum_seconds
        )
        hosting = Hosting(registry, queue, turn_seconds=config.model_turn_seconds)
        catalog = ModelCatalog(registry, hosting)
        store = ObjectStore(config.results) if config.results else None
        results = ResultStore(data_dir.results_path, store)
        housekeeping = asyncio.create_task(
            keep_house(journal, book, results, retention_seconds=config.retention_seconds)
        )
        cleanup.callback(housekeeping.cancel)
        uploads = UploadStore(data_dir.uploads_path, max_bytes=config.upload_store_bytes)
        await uploads.open()
        metrics.watch_journal(lambda: journal.num_pending)
        metrics.watch_uploads(lambda: uploads.num_bytes)
        dispatcher = Dispatcher(
            queue,
            registry,
            book,
            results,
            uploads,
            metrics,
            hosting,
            catalog,
            max_queued=config.max_queued_sessions,
            max_attempts=config.max_attempts,
            orphan_grace_seconds=config.orphan_grace_seconds,
            quantum_seconds=config.quantum_seconds,
        )
        since = datetime.datetime.now(datetime.UTC) - _LATELY
        catalog.await_again(await journal.models_since(since))
        await take_over(journal, book, dispatcher, uploads)
        admission = Admission(
            catalog,
            journal,
            dispatcher,
            uploads,
            metrics,
            max_session_bytes=config.max_session_bytes,
            limits=config.limits,
        )
        scheduler_servicer = SchedulerServicer(
            admission=admission,
            book=book,
            dispatcher=dispatcher,
            results=results,
            uploads=uploads,
            catalog=catalog,
            registry=registry,
            metrics=metrics,
            version=version,
            max_session_bytes=config.max_session_bytes,
        )
        registry_servicer = RegistryServicer(
            registry, catalog, dispatcher, metrics, config.tls, epoch=journal.epoch
        )
        authenticator = Authenticator(keys, BadAttempts(), on_failure=metrics.refused)
        if http_server is not None:
            status_page = StatusPage(
                authenticator=authenticator,
                book=book,
                catalog=catalog,
                registry=registry,
                observer=dispatcher.observer,
                version=version,
                is_open=config.api_keys_file is None,
            )
            cleanup.enter_context(http_server.showing(status_page))
        gate = Gate(authenticator)
        shards_only = CallerCheck(
            *_SHARD_SIDE_NAMES,
            metadata_key=JOIN_TOKEN_METADATA,
            token=config.join_token,
            names=frozenset({SHARD_NAME} if config.tls.is_mutual else ()),
        )
        interceptors = [ErrorInterceptor(metrics.answered), gate, shards_only]
        host_servicer = HostServicer(hosting, catalog, dispatcher)
        servicers = (scheduler_servicer, registry_servicer, host_servicer)
        await self._serve(cleanup, *servicers, dispatcher, interceptors)
        data_dir.publish(self.address, self.metrics_address)

    async def _start_http(
        self, cleanup: AsyncExitStack, metrics: SchedulerMetrics
    ) -> HttpServer | None:
        """Tells metrics from now on, also while the scheduler stands by."""
        config = self._config
        if config.metrics_port is None:
            return None
        http_server = HttpServer(metrics)
        await http_server.start(config.host, config.metrics_port)
        cleanup.push_async_callback(http_server.stop)
        self.metrics_address = http_server.address
        return http_server

    async def _open_journal(
        self, cleanup: AsyncExitStack, metrics: SchedulerMetrics
    ) -> tuple[DataDir, Journal]:
        """Takes the data folder and opens the journal; one that is shared first, and stands by."""
        config = self._config
        data_dir = None if config.journal else DataDir(config.data_dir)
        if data_dir is not None:
            cleanup.callback(data_dir.close)
        url = config.journal or (data_dir.journal_url if data_dir else "")
        journal = Journal(url, on_commit=metrics.committed, on_lost=self._lose)
        await journal.open()
        cleanup.push_async_callback(journal.close)
        metrics.leads(journal.epoch)
        if data_dir is None:
            data_dir = await DataDir.once_free(config.data_dir)
            cleanup.callback(data_dir.close)
        return data_dir, journal

    def _lose(self) -> None:
        _log.critical("the journal's database is gone, or another scheduler leads: this one stops")
        self.is_lost = True
        if self._book is not None:
            self._book.shut()
        if self._on_lost is not None:
            self._on_lost()

    async def _serve(
        self,
        cleanup: AsyncExitStack,
        scheduler_servicer: SchedulerServicer,
        registry_servicer: RegistryServicer,
        host_servicer: HostServicer,
        dispatcher: Dispatcher,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(
            scheduler_servicer, server
        )
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(registry_servicer, server)
        host_service_pb2_grpc.add_HostServiceServicer_to_server(host_servicer, server)
        self._health.add_to(server)
        config, host, grace_seconds = self._config, self._config.host, self._config.grace_seconds
        if config.has_reflection:
            names = (*_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        self.address = endpoint(host, _bind(server, host, config.port, config.tls))
        if config.shard_port is not None:
            port = _bind(server, host, config.shard_port, config.tls, is_mutual=True)
            self.shard_address = endpoint(host, port)
            _log.info("shard groups register at %s", self.shard_address)
        cleanup.push_async_callback(server.stop, grace_seconds)
        await server.start()
        cleanup.push_async_callback(registry_servicer.stop)
        cleanup.callback(host_servicer.stop)
        cleanup.push_async_callback(dispatcher.stop, grace_seconds)
        registry_servicer.start()
        await self._health.set_serving(True)
        cleanup.push_async_callback(self._health.set_serving, False)


def _bind(
    server: grpc.aio.Server, host: str, port: int, tls: Tls, *, is_mutual: bool = False
) -> int:
    """Has the server listen; gives its port."""
    return listen(
        lambda address: tls.add_port(server, address, is_mutual=is_mutual),
        host,
        port,
        what=f"listen on {endpoint(host, port)}",
        cure="--port, or 0",
    )

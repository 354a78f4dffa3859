"""One rank's life: join the group, load the model, lead or follow, stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from insitu_proto.v1 import placement_pb2, shard_service_pb2, shard_service_pb2_grpc
from insitu_shard.command_channel import CommandChannel, bound_collectives, join_group
from insitu_shard.compiler import Limits
from insitu_shard.downloads import Downloads
from insitu_shard.engine import Budgets, load_model, parse_dtype, rank_device, resolve_model_folder
from insitu_shard.engine_thread import EngineThread
from insitu_shard.epochs import Epochs
from insitu_shard.group import Leader, follow
from insitu_shard.metrics import ShardMetrics
from insitu_shard.registration import Registration
from insitu_shard.service import ShardServicer
from insitu_shard.upload_cache import UploadCache
from insitu_wire.callers import CallerCheck
from insitu_wire.errors import Reason, error
from insitu_wire.health import Health
from insitu_wire.interceptor import ErrorInterceptor
from insitu_wire.limits import ACCESS_TOKEN_METADATA, SERVER_OPTIONS
from insitu_wire.listening import endpoint, listen
from insitu_wire.tls import SCHEDULER_NAME, SHARD_NAME

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from insitu_shard.config import ShardConfig
    from insitu_shard.engine import LoadedModel
    from insitu_shard.engine.ranks import Ranks

_log = logging.getLogger(__name__)

_TIDY_SECONDS = 60.0
_REPORT_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0

_SERVICE_NAME = shard_service_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name


def run_rank(config: ShardConfig, rank: int) -> None:
    """Runs this process's rank until it is told to stop.

    Raises:
        Error: the group can not start, or was lost.
    """
    ranks = join_group(config.num_ranks, rank)
    channel = CommandChannel(ranks, timeout_seconds=config.collective_timeout_seconds)
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if ranks.is_leader and num_restarts:
        _log.warning("the ranks of %s were started again, time %d", config.model, num_restarts)
    if not ranks.is_leader:
        model = _load(config, ranks)
        try:
            follow(model, channel, budgets=_budgets(config), limits=_limits(config))
        except Exception as exception:
            ranks.say_why(exception)
            raise
    else:
        asyncio.run(_lead(config, ranks, channel))


def _load(config: ShardConfig, ranks: Ranks) -> LoadedModel:
    device = rank_device(int(os.environ.get("LOCAL_RANK", ranks.rank)))
    model = load_model(
        config.model,
        resolve_model_folder(config.model_path),
        ranks=ranks,
        device=device,
        dtype=parse_dtype(config.dtype, device) if config.dtype else None,
        spread=config.spread,
    )
    # What is done once, at the first pass, is done before the first user comes.
    model.warm_up()
    bound_collectives(ranks, config.collective_timeout_seconds)
    return model


def _budgets(config: ShardConfig) -> Budgets:
    return Budgets(config.kept_bytes, config.session_bytes, config.handle_bytes)


def _limits(config: ShardConfig) -> Limits:
    return Limits(config.max_pass_tokens, config.max_pass_bytes, config.max_graph_bytes)


async def _lead(config: ShardConfig, ranks: Ranks, channel: CommandChannel) -> None:
    # One thread does all that torch does in this process. Each thread that calls torch gets worker
    # threads of its own, and those of two get in each other's way: a forward pass took 1.25 times
    # as long on two cores.
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    health = Health(_SERVICE_NAME)
    await health.start(config.host, config.health_port)
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    model = await loop.run_in_executor(thread, _load, config, ranks)
    load_seconds = time.monotonic() - started
    description = await loop.run_in_executor(thread, model.describe)
    # What is there now stays: looking through it takes longer than a session.
    gc.collect()
    gc.freeze()
    leader = Leader(
        model,
        channel,
        UploadCache(config.upload_cache_bytes),
        budgets=_budgets(config),
        kept_seconds=config.kept_seconds,
        limits=_limits(config),
    )
    metrics = ShardMetrics(model.name)
    metrics.loaded(
        load_seconds, kept_limit_bytes=config.kept_bytes, handle_limit_bytes=config.handle_bytes
    )
    leader.watch_passes(metrics.pass_ran)
    stopping, gone = asyncio.Event(), asyncio.Event()
    reasons: list[str] = []

    def lost(why: str) -> None:
        reasons.append(why)
        gone.set()
        stopping.set()

    engine = EngineThread(
        leader, metrics, thread=thread, downloads=Downloads(model.device), on_lost=lost
    )
    servicer = ShardServicer(leader, description, engine, config.tls)
    access_token = secrets.token_hex(32)
    epochs = Epochs()
    server, address = await _start(config, servicer, access_token, metrics, epochs, health)
    if config.metrics_port is not None:
        httpd, _ = start_http_server(
            config.metrics_port, addr=config.host, registry=metrics.registry
        )
        _log.info("metrics are at http://%s:%d/metrics", config.host, httpd.server_port)
    _stop_on_signals(stopping)
    registration = Registration(
        config.scheduler,
        _shard_group(config, address),
        on_lost=servicer.release_all,
        access_token=access_token,
        on_epoch=epochs.heard,
        join_token=config.join_token,
        tls=config.tls,
    )
    registering = asyncio.create_task(registration.run())
    tidying = asyncio.create_task(servicer.tidy(min(config.kept_seconds, _TIDY_SECONDS)))
    reporting = asyncio.create_task(_report(leader, engine, metrics))
    _log.info("%s is served at %s over %d rank(s)", model.name, address, config.num_ranks)
    await stopping.wait()
    await health.set_serving(False)
    await _first_of(registration.drain(), gone.wait(), seconds=config.grace_seconds)
    # Those whose sessions are lost are told why.
    await server.stop(_LAST_WORDS_SECONDS)
    await health.stop()
    registering.cancel()
    tidying.cancel()
    reporting.cancel()
    if reasons:
        raise error(Reason.REPLICA_LOST, f"the shard group of {model.name} was lost: {reasons[0]}")
    await asyncio.to_thread(engine.stop)


async def _first_of(*waits: Coroutine[Any, Any, object], seconds: float) -> None:
    """Waits until one of some has ended, or for some seconds."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _report(leader: Leader, engine: EngineThread, metrics: ShardMetrics) -> None:
    """Has the ranks tell how they are, now and then, between rounds."""
    while True:
        metrics.reported(await engine.do(leader.report))
        await asyncio.sleep(_REPORT_SECONDS)


async def _start(
    config: ShardConfig,
    servicer: ShardServicer,
    access_token: str,
    metrics: ShardMetrics,
    epochs: Epochs,
    health: Health,
) -> tuple[grpc.aio.Server, str]:
    peers_only = CallerCheck(
        _SERVICE_NAME,
        metadata_key=ACCESS_TOKEN_METADATA,
        token=access_token,
        names=frozenset({SCHEDULER_NAME, SHARD_NAME} if config.tls.is_mutual else ()),
        also=epochs.check,
    )
    interceptors = [ErrorInterceptor(metrics.answered), peers_only]
    server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
    shard_service_pb2_grpc.add_ShardServiceServicer_to_server(servicer, server)
    health.add_to(server)
    if config.has_reflection:
        names = (_SERVICE_NAME, reflection.SERVICE_NAME, "grpc.health.v1.Health")
        reflection.enable_server_reflection(names, server)
    port = listen(
        lambda address: config.tls.add_port(server, address, is_mutual=True),
        config.host,
        config.port,
        what=f"listen on {endpoint(config.host, config.port)}",
        cure="--port, or 0",
    )
    await server.start()
    await health.set_serving(True)
    return server, endpoint(config.host, port)


def _stop_on_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)


def _shard_group(config: ShardConfig, address: str) -> placement_pb2.ShardGroup:
    return placement_pb2.ShardGroup(
        group_id=uuid.uuid4().hex,
        model=config.model,
        address=config.advertise_address or address,
        num_ranks=config.num_ranks,
        max_sessions=config.max_sessions,
        handle_bytes=config.handle_bytes,
        host_id=config.host_id,
    )

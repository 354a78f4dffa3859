"""Starts a scheduler: `python -m insitu_scheduler --data-dir DIR`."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.limits import Limits
from insitu_scheduler.server import Server
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import MAX_SESSION_BYTES
from insitu_wire.logs import LogFormat, set_up_logging
from insitu_wire.paths import state_folder
from insitu_wire.tls import Tls


def run(
    host: Annotated[
        str, typer.Option(envvar="INSITU_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="INSITU_PORT", help="Port to listen on; 0 takes a free one.")
    ] = 7433,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="INSITU_DATA_DIR", help="Folder of the journal and of results."),
    ] = None,
    journal: Annotated[
        str | None,
        typer.Option(
            envvar="INSITU_JOURNAL",
            help="Journal, as postgresql://USER:PASSWORD@HOST/DATABASE; a second scheduler with "
            "the same stands by. Without it, a SQLite file in the data folder.",
        ),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            envvar="INSITU_RESULTS",
            help="Where results are kept, as s3://BUCKET/PREFIX or file:///FOLDER; without it, in "
            "the data folder.",
        ),
    ] = None,
    metrics_port: Annotated[
        int,
        typer.Option(envvar="INSITU_METRICS_PORT", help="Port of /metrics; 0 a free one, -1 none."),
    ] = 0,
    health_port: Annotated[
        int,
        typer.Option(
            envvar="INSITU_HEALTH_PORT",
            help="Port that answers probes (grpc.health.v1) without TLS, from the start on; -1 "
            "none.",
        ),
    ] = -1,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="INSITU_API_KEYS_FILE",
            help="File of API keys, as `insitu keys` writes it or with lines USER:KEY; without one "
            "any key is accepted, on loopback only.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="INSITU_TLS_CERT", help="Certificate to serve with, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="INSITU_TLS_KEY", help="The certificate's key, PEM.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="INSITU_TLS_CLIENT_CA",
            help="Roots of the certificates of scheduler and shard groups, PEM: these alone "
            "may register, at --shard-port.",
        ),
    ] = None,
    shard_port: Annotated[
        int | None,
        typer.Option(
            envvar="INSITU_SHARD_PORT",
            help="Port that shard groups register at with --tls-client-ca.",
        ),
    ] = None,
    join_token: Annotated[
        str,
        typer.Option(
            envvar="INSITU_JOIN_TOKEN",
            show_default=False,
            help="What shard groups have to know to register; better given as the variable.",
        ),
    ] = "",
    reflection: Annotated[
        bool,
        typer.Option(envvar="INSITU_REFLECTION", help="Whether gRPC reflection tells of services."),
    ] = True,
    operator_key_sha256: Annotated[
        str,
        typer.Option(
            envvar="INSITU_OPERATOR_KEY_SHA256",
            help="SHA-256 of one more administrator's key, of whoever starts the scheduler.",
        ),
    ] = "",
    max_session_bytes: Annotated[
        int, typer.Option(envvar="INSITU_MAX_SESSION_BYTES", help="Largest session, in bytes.")
    ] = MAX_SESSION_BYTES,
    upload_store_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_UPLOAD_STORE_BYTES", help="Room for tensors that users upload, in bytes."
        ),
    ] = 64 * 1024**3,
    max_queued_sessions: Annotated[
        int, typer.Option(envvar="INSITU_MAX_QUEUED_SESSIONS", help="Sessions that may wait.")
    ] = 10_000,
    max_waiting_sessions: Annotated[
        int | None,
        typer.Option(
            envvar="INSITU_MAX_WAITING_SESSIONS",
            help="Sessions of each user that may wait at the same time.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="INSITU_MAX_TOKENS", help="Tokens that a session takes through its models."
        ),
    ] = None,
    max_saved_bytes: Annotated[
        int | None,
        typer.Option(envvar="INSITU_MAX_SAVED_BYTES", help="Bytes that a session may save."),
    ] = None,
    max_handle_bytes: Annotated[
        int | None,
        typer.Option(
            envvar="INSITU_MAX_HANDLE_BYTES",
            help="Bytes that a session's values may take on each rank between its steps.",
        ),
    ] = None,
    max_kept_bytes: Annotated[
        int | None,
        typer.Option(
            envvar="INSITU_MAX_KEPT_BYTES",
            help="Bytes that a user's values may take on each rank beyond sessions.",
        ),
    ] = None,
    max_run_seconds: Annotated[
        float | None,
        typer.Option(envvar="INSITU_MAX_RUN_SECONDS", help="How long a session may run."),
    ] = None,
    max_attempts: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_ATTEMPTS",
            help="How often a session is run at most, if what runs it is lost each time.",
        ),
    ] = 3,
    max_wait_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_MAX_WAIT_SECONDS",
            help="How long a user may wait for a turn, however much the user has had.",
        ),
    ] = 600.0,
    model_turn_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_MODEL_TURN_SECONDS",
            help="How long a host keeps a model loaded that is in use, while sessions wait for "
            "another that its memory does not hold beside it.",
        ),
    ] = 60.0,
    quantum_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_QUANTUM_SECONDS",
            help="Shard time after which a session that runs may have to wait again for others.",
        ),
    ] = 30.0,
    retention_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_RETENTION_SECONDS",
            help="How long a session that has ended is kept, with what it saved.",
        ),
    ] = 7 * 24 * 3600.0,
    lease_ttl_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_LEASE_TTL_SECONDS", help="How long a shard group may be silent."
        ),
    ] = 10.0,
    orphan_grace_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_ORPHAN_GRACE_SECONDS",
            help="How long an attached session lives without anybody watching it.",
        ),
    ] = 5.0,
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="INSITU_LOG_FORMAT", help="How lines of the log look."),
    ] = LogFormat.TEXT,
    grace_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_GRACE_SECONDS", help="How long what runs may still take at the end."
        ),
    ] = 10.0,
) -> None:
    """Takes sessions from clients and has shard groups run them, until SIGTERM or Ctrl-C."""
    set_up_logging(log_format)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        config = SchedulerConfig(
            data_dir=(data_dir or state_folder()).absolute(),
            journal=journal,
            results=results,
            host=host,
            port=port,
            metrics_port=metrics_port if metrics_port != -1 else None,
            health_port=health_port if health_port != -1 else None,
            api_keys_file=api_keys_file,
            tls=Tls(cert=tls_cert, key=tls_key, ca=tls_client_ca),
            shard_port=shard_port,
            join_token=join_token,
            has_reflection=reflection,
            operator_key_sha256=operator_key_sha256,
            limits=Limits(
                max_waiting_sessions=max_waiting_sessions,
                max_tokens=max_tokens,
                max_saved_bytes=max_saved_bytes,
                max_handle_bytes=max_handle_bytes,
                max_kept_bytes=max_kept_bytes,
                max_run_seconds=max_run_seconds,
            ),
            max_session_bytes=max_session_bytes,
            upload_store_bytes=upload_store_bytes,
            max_queued_sessions=max_queued_sessions,
            max_attempts=max_attempts,
            max_wait_seconds=max_wait_seconds,
            model_turn_seconds=model_turn_seconds,
            quantum_seconds=quantum_seconds,
            retention_seconds=retention_seconds,
            lease_ttl_seconds=lease_ttl_seconds,
            orphan_grace_seconds=orphan_grace_seconds,
            grace_seconds=grace_seconds,
        )
        asyncio.run(_serve(config))
    except Error as err:
        typer.echo(f"insitu scheduler: {err}", err=True)
        raise typer.Exit(1) from err


async def _serve(config: SchedulerConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(config, on_lost=stopping.set)
    starting = asyncio.create_task(server.start())
    told = asyncio.create_task(stopping.wait())
    # One that stands by may be told to stop before it has begun to serve.
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return
    try:
        await starting
        await told
    finally:
        told.cancel()
        await server.stop()
    if server.is_lost:
        raise error(
            Reason.INTERNAL,
            "the journal's database is gone, or another scheduler leads; start this one again, to "
            "stand by",
        )


def main() -> None:
    """Runs the command."""
    typer.run(run)


if __name__ == "__main__":
    main()

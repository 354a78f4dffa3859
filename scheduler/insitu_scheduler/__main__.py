"""Starts a scheduler: `python -m insitu_scheduler --data-dir DIR`."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.server import Server
from insitu_wire.errors import Error
from insitu_wire.limits import MAX_SESSION_BYTES
from insitu_wire.paths import state_folder


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
    metrics_port: Annotated[
        int,
        typer.Option(envvar="INSITU_METRICS_PORT", help="Port of /metrics; 0 a free one, -1 none."),
    ] = 0,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="INSITU_API_KEYS_FILE",
            help="File of lines USER:KEY; without one any key is accepted, on loopback only.",
        ),
    ] = None,
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
    grace_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_GRACE_SECONDS", help="How long what runs may still take at the end."
        ),
    ] = 10.0,
) -> None:
    """Takes sessions from clients and has shard groups run them, until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        config = SchedulerConfig(
            data_dir=(data_dir or state_folder()).absolute(),
            host=host,
            port=port,
            metrics_port=metrics_port if metrics_port != -1 else None,
            api_keys_file=api_keys_file,
            max_session_bytes=max_session_bytes,
            upload_store_bytes=upload_store_bytes,
            max_queued_sessions=max_queued_sessions,
            max_attempts=max_attempts,
            max_wait_seconds=max_wait_seconds,
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
    async with Server(config):
        await stopping.wait()


def main() -> None:
    """Runs the command."""
    typer.run(run)


if __name__ == "__main__":
    main()

"""Starts a host: `python -m insitu_shard.host --model A=PATH --model B=PATH --max-loaded 1`."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from pathlib import Path
from typing import Annotated

import typer

from insitu_proto.v1.host_service_pb2 import Host, RegisterHostRequest
from insitu_shard.config import ShardConfig, parse_model
from insitu_shard.host.agent import HostAgent
from insitu_shard.host.groups import HostedGroups
from insitu_wire.errors import Error, Reason, error
from insitu_wire.logs import LogFormat, set_up_logging
from insitu_wire.tls import Tls


def run(
    model: Annotated[
        list[str], typer.Option(help="Model that can be served, as NAME=PATH; may be repeated.")
    ],
    max_loaded: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_LOADED", help="How many of the models fit into memory at once."
        ),
    ],
    scheduler: Annotated[
        str, typer.Option(envvar="INSITU_SCHEDULER", help="host:port of the scheduler.")
    ] = "127.0.0.1:7433",
    tp: Annotated[
        int, typer.Option(envvar="INSITU_TP", help="Ranks to split each model over.")
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(envvar="INSITU_DTYPE", help="Element type of weights; default: as stored."),
    ] = "",
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="INSITU_LOG_FORMAT", help="How lines of the log look."),
    ] = LogFormat.TEXT,
) -> None:
    """Loads and unloads models as the scheduler orders, until SIGTERM or Ctrl-C.

    Each is served by a shard group of its own, which reads the settings of `insitu shard` from the
    environment; the host itself those of certificates and the join token.
    """
    set_up_logging(log_format)
    try:
        asyncio.run(_serve(dict(map(parse_model, model)), max_loaded, scheduler, tp, dtype))
    except Error as err:
        typer.echo(f"insitu host: {err}", err=True)
        raise typer.Exit(1) from err


async def _serve(
    models: dict[str, str], max_loaded: int, scheduler: str, tp: int, dtype: str
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    host = Host(host_id=uuid.uuid4().hex, max_loaded=_checked(max_loaded))
    descriptions = await asyncio.to_thread(_describe, models, scheduler, tp, dtype)
    shared = ["--scheduler", scheduler, "--tp", str(tp), "--host-id", host.host_id, "--port", "0"]
    shared += ["--metrics-port", "0", *(["--dtype", dtype] if dtype else [])]
    arguments = {name: ["--model", f"{name}={path}", *shared] for name, path in models.items()}
    groups = HostedGroups(arguments, max_loaded=max_loaded)
    agent = HostAgent(
        scheduler,
        host,
        descriptions,
        groups,
        join_token=os.environ.get("INSITU_JOIN_TOKEN", ""),
        tls=_tls_of_environment(),
    )
    await agent.run(stopping)


def _tls_of_environment() -> Tls:
    names = ("INSITU_TLS_CERT", "INSITU_TLS_KEY", "INSITU_TLS_CLIENT_CA")
    tls = Tls(*(Path(os.environ[name]) if os.environ.get(name) else None for name in names))
    tls.check()
    return tls


def _checked(max_loaded: int) -> int:
    if max_loaded < 1:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"--max-loaded is {max_loaded}; it is how many models fit into memory at once, 1 or "
            "more",
            maxLoaded=max_loaded,
        )
    return max_loaded


def _describe(
    models: dict[str, str], scheduler: str, tp: int, dtype: str
) -> list[RegisterHostRequest]:
    from insitu_shard.host.described import described
    from insitu_shard.placing import with_placement
    from insitu_shard.preflight import check_before_start

    messages: list[RegisterHostRequest] = []
    for name, path in models.items():
        config = ShardConfig(name, path, scheduler, num_ranks=tp, dtype=dtype)
        check_before_start(with_placement(config))
        messages += described(name, path, dtype=dtype)
    return messages


def main() -> None:
    """Runs the command."""
    typer.run(run)


if __name__ == "__main__":
    main()

"""Starts a shard group: `python -m insitu_shard --model NAME=PATH --scheduler HOST:PORT`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from insitu_shard.config import Placement, ShardConfig, parse_model
from insitu_wire.errors import Error
from insitu_wire.logs import LogFormat, set_up_logging
from insitu_wire.tls import Tls


def run(
    model: Annotated[
        str, typer.Option(envvar="INSITU_MODEL", help="Model to serve, as NAME or NAME=PATH.")
    ],
    scheduler: Annotated[
        str, typer.Option(envvar="INSITU_SCHEDULER", help="host:port of the scheduler.")
    ] = "127.0.0.1:7433",
    tp: Annotated[int, typer.Option(envvar="INSITU_TP", help="Ranks to split the model over.")] = 1,
    host: Annotated[
        str, typer.Option(envvar="INSITU_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="INSITU_PORT", help="Port to listen on; 0 takes a free one.")
    ] = 0,
    advertise_address: Annotated[
        str,
        typer.Option(
            envvar="INSITU_ADVERTISE_ADDRESS",
            help="host:port under which the scheduler reaches this group, if not where it listens.",
        ),
    ] = "",
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
            help="Roots of the certificates of scheduler and shard groups, PEM: it takes calls "
            "of these alone.",
        ),
    ] = None,
    join_token: Annotated[
        str,
        typer.Option(
            envvar="INSITU_JOIN_TOKEN",
            show_default=False,
            help="What the scheduler wants of groups that register; better given as the variable.",
        ),
    ] = "",
    reflection: Annotated[
        bool,
        typer.Option(envvar="INSITU_REFLECTION", help="Whether gRPC reflection tells of services."),
    ] = True,
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="INSITU_LOG_FORMAT", help="How lines of the log look."),
    ] = LogFormat.TEXT,
    metrics_port: Annotated[
        int,
        typer.Option(envvar="INSITU_METRICS_PORT", help="Port of /metrics; 0 a free one, -1 none."),
    ] = -1,
    health_port: Annotated[
        int,
        typer.Option(
            envvar="INSITU_HEALTH_PORT",
            help="Port that answers probes (grpc.health.v1) without TLS, from the start on; -1 "
            "none.",
        ),
    ] = -1,
    max_sessions: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_SESSIONS", help="How many sessions the group runs at once."
        ),
    ] = 16,
    max_pass_tokens: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_PASS_TOKENS",
            help="How many tokens, over all rows of a forward pass, go through a layer at once.",
        ),
    ] = 8192,
    max_pass_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_PASS_BYTES",
            help="Memory that a forward pass may take beside the weights, by estimate, in bytes.",
        ),
    ] = 2 * 1024**3,
    max_graph_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_GRAPH_BYTES",
            help="Memory that a trace may keep for its gradients, by estimate, in bytes.",
        ),
    ] = 8 * 1024**3,
    dtype: Annotated[
        str,
        typer.Option(envvar="INSITU_DTYPE", help="Element type of weights; default: as stored."),
    ] = "",
    require_gpus: Annotated[
        bool,
        typer.Option(
            envvar="INSITU_REQUIRE_GPUS",
            help="Whether to refuse to start where no GPU is found; else ranks run on the CPU "
            "there.",
        ),
    ] = False,
    placement: Annotated[
        Placement,
        typer.Option(
            envvar="INSITU_PLACEMENT",
            help="How devices share the model: tp splits it over ranks, spread puts its layers on "
            "them one after the other in one rank, auto takes the first that is possible.",
        ),
    ] = Placement.AUTO,
    max_memory: Annotated[
        str,
        typer.Option(
            envvar="INSITU_MAX_MEMORY",
            help="How much of a spread model goes where, as 0=20GiB,cpu=64GiB with the numbers of "
            "GPUs; the rest stays on disk. Default: what is free.",
        ),
    ] = "",
    kept_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_KEPT_BYTES",
            help="Memory of each rank for values that one user keeps beyond sessions, in bytes.",
        ),
    ] = 4 * 1024**3,
    session_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_SESSION_BYTES",
            help="Memory of each rank for values that the steps of one session give to later ones, "
            "in bytes.",
        ),
    ] = 8 * 1024**3,
    handle_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_HANDLE_BYTES", help="The same, for all sessions together, in bytes."
        ),
    ] = 16 * 1024**3,
    kept_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_KEPT_SECONDS",
            help="How long a value that a user keeps stays after its last use, in seconds.",
        ),
    ] = 3600.0,
    collective_timeout_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_COLLECTIVE_TIMEOUT_SECONDS",
            help="How long a rank waits for the others before the group is given up.",
        ),
    ] = 60.0,
    grace_seconds: Annotated[
        float,
        typer.Option(
            envvar="INSITU_SHARD_GRACE_SECONDS",
            help="How long what runs may still take once the group is told to stop.",
        ),
    ] = 30.0,
    max_restarts: Annotated[
        int,
        typer.Option(
            envvar="INSITU_MAX_RESTARTS",
            help="How often torchrun starts the ranks again after one has failed.",
        ),
    ] = 3,
    nodes: Annotated[
        int,
        typer.Option(
            envvar=["INSITU_NODES", "LWS_GROUP_SIZE"],
            help="Machines that share the ranks of the group; each runs this command.",
        ),
    ] = 1,
    node_rank: Annotated[
        int,
        typer.Option(
            envvar=["INSITU_NODE_RANK", "LWS_WORKER_INDEX"],
            help="Which of these machines this is, from 0; machine 0 has the leader.",
        ),
    ] = 0,
    rendezvous: Annotated[
        str,
        typer.Option(
            envvar=["INSITU_RENDEZVOUS", "LWS_LEADER_ADDRESS"],
            help="host or host:port of machine 0, where the machines of a group meet.",
        ),
    ] = "",
    host_id: Annotated[
        str, typer.Option(help="Name of the host that starts the group.", hidden=True)
    ] = "",
    upload_cache_bytes: Annotated[
        int,
        typer.Option(
            envvar="INSITU_UPLOAD_CACHE_BYTES",
            help="Memory of each rank for tensors that users bring, in bytes.",
        ),
    ] = 8 * 1024**3,
) -> None:
    """Serves one model by a group of ranks until SIGTERM or Ctrl-C."""
    set_up_logging(log_format)
    name, path = parse_model(model)
    try:
        config = ShardConfig(
            model=name,
            model_path=path,
            scheduler=scheduler,
            host=host,
            port=port,
            advertise_address=advertise_address,
            tls=Tls(cert=tls_cert, key=tls_key, ca=tls_client_ca),
            join_token=join_token,
            log_format=log_format,
            has_reflection=reflection,
            metrics_port=metrics_port if metrics_port >= 0 else None,
            health_port=health_port if health_port >= 0 else None,
            num_ranks=tp,
            max_sessions=max_sessions,
            max_pass_tokens=max_pass_tokens,
            max_pass_bytes=max_pass_bytes,
            max_graph_bytes=max_graph_bytes,
            needs_gpus=require_gpus,
            placement=placement,
            max_memory=max_memory,
            dtype=dtype,
            upload_cache_bytes=upload_cache_bytes,
            kept_bytes=kept_bytes,
            session_bytes=session_bytes,
            handle_bytes=handle_bytes,
            kept_seconds=kept_seconds,
            collective_timeout_seconds=collective_timeout_seconds,
            grace_seconds=grace_seconds,
            max_restarts=max_restarts,
            num_nodes=nodes,
            node_rank=node_rank,
            rendezvous=rendezvous,
            host_id=host_id,
        )
        from insitu_shard.launching import launch_ranks

        launch_ranks(config)
    except Error as err:
        typer.echo(f"insitu shard: {err}", err=True)
        raise typer.Exit(1) from err


def main() -> None:
    """Runs the command."""
    typer.run(run)


if __name__ == "__main__":
    main()

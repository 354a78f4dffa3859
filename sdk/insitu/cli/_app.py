"""The `insitu` command and its subcommands."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from insitu._config import CONFIG, DEFAULT_ENDPOINT
from insitu.backends.remote import RemoteBackend
from insitu.cli._sessions import app as sessions_app
from insitu_wire.errors import Error
from insitu_wire.paths import state_folder

app = typer.Typer(
    name="insitu",
    help="Look inside large language models where they run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT_PORT = int(DEFAULT_ENDPOINT.rpartition(":")[2])


@app.command()
def up(
    model: Annotated[
        list[str], typer.Option(help="Model to serve, as ID or ID=PATH; may be repeated.")
    ],
    tp: Annotated[
        int, typer.Option(envvar="INSITU_TP", help="Ranks to split each model over.")
    ] = 1,
    port: Annotated[
        int, typer.Option(envvar="INSITU_PORT", help="The scheduler's port; 0 takes a free one.")
    ] = _DEFAULT_PORT,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="INSITU_DATA_DIR", help="Folder of the journal and of results."),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="INSITU_API_KEYS_FILE",
            help="File of API keys, as `insitu keys` writes it or with lines USER:KEY; without one "
            "any key is accepted, on loopback only.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(envvar="INSITU_DTYPE", help="Element type of weights; default: as stored."),
    ] = "",
    replicas: Annotated[int, typer.Option(help="Shard groups of each model.")] = 1,
    max_loaded: Annotated[
        int | None,
        typer.Option(
            help="How many of the models fit into memory at once; they are loaded and unloaded as "
            "sessions ask for them. Default: all are loaded, and stay."
        ),
    ] = None,
    monitoring: Annotated[
        bool, typer.Option(help="Whether to start Prometheus, too, if it is installed.")
    ] = False,
) -> None:
    """Starts a server on this machine: a scheduler, and shard groups for each model.

    What ends by itself is started again.
    """
    from insitu.cli._up import Deployment, UpConfig

    config = UpConfig(
        models=tuple(model),
        tp=tp,
        port=port,
        data_dir=(data_dir or state_folder()).absolute(),
        api_keys_file=api_keys_file,
        dtype=dtype,
        replicas=replicas,
        max_loaded=max_loaded,
        has_monitoring=monitoring,
    )
    raise typer.Exit(Deployment(config).run())


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def scheduler(context: typer.Context) -> None:
    """Starts a scheduler alone (`insitu scheduler --help` tells its flags)."""
    _become("insitu_scheduler", context.args)


@app.command(context_settings=_PASS_ON)
def shard(context: typer.Context) -> None:
    """Starts a shard group alone (`insitu shard --help` tells its flags)."""
    _become("insitu_shard", context.args)


@app.command(context_settings=_PASS_ON)
def keys(context: typer.Context) -> None:
    """Makes, lists and revokes API keys of a server (`insitu keys --help` tells how)."""
    _become("insitu_scheduler.keys_command", context.args)


@app.command(context_settings=_PASS_ON)
def host(context: typer.Context) -> None:
    """Starts a host alone (`insitu host --help`): it loads models as they are asked for."""
    _become("insitu_shard.host", context.args)


@app.command(name="demo-model")
def demo_model() -> None:
    """Writes the demo model, SmolLM2-135M-Instruct, to the cache once, and prints its folder."""
    from insitu.cli._demo_model import prepare_demo_model

    print(prepare_demo_model())


_File = Annotated[Path, typer.Argument(help="File that session.save(path) wrote.")]


@app.command()
def run(
    file: _File,
    remote: Annotated[
        bool,
        typer.Option("--remote/--local", help="Whether it runs on the server, or in this process."),
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="File for the saved values, as safetensors.")
    ] = None,
) -> None:
    """Runs a session from a file, and shows its events and what it saved."""
    from insitu.cli._run import run_file

    run_file(file, remote=remote, output=output)


@app.command()
def show(file: _File) -> None:
    """Prints a session from a file as text, under the lines of code that recorded it."""
    from insitu._session_file import read_session
    from insitu.cli._dump import dump

    for line in dump(read_session(file)):
        print(line)


app.add_typer(sessions_app, name="sessions")


@app.command()
def status() -> None:
    """Shows the server's models, shard groups and queues, and your newest sessions."""
    from insitu.cli._status import show_status

    with closing(RemoteBackend(CONFIG)) as backend:
        show_status(backend, CONFIG.endpoint)


@app.command()
def top(
    seconds: Annotated[float, typer.Option(help="How often it is drawn anew.")] = 2.0,
    count: Annotated[int, typer.Option(help="How many times it is drawn; 0 for no end.")] = 0,
    all_users: Annotated[
        bool, typer.Option("--all", help="Show the sessions of all users; for administrators.")
    ] = False,
) -> None:
    """Shows the server's state, live, until Ctrl-C."""
    from insitu.cli._status import show_top

    with closing(RemoteBackend(CONFIG)) as backend:
        show_top(backend, CONFIG.endpoint, seconds=seconds, count=count, all_users=all_users)


@app.command()
def drain(
    group: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of shard groups, or their beginnings; none for the whole server."),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take new sessions again.")] = False,
) -> None:
    """Has the server, or shard groups, take nothing new; what runs ends. For administrators."""
    with closing(RemoteBackend(CONFIG)) as backend:
        drained = backend.drain(group or [], undo=undo)
    for group_id in drained:
        print(f"shard group {group_id} is sent nothing new")
    if not drained:
        print(f"the server at {CONFIG.endpoint} {'takes' if undo else 'takes no'} new sessions")


def _become(module: str, arguments: list[str]) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def main() -> None:
    """Runs the command; an error of ours is one message on standard error and exit status 1."""
    try:
        app()
    except Error as err:
        print(f"insitu: {err}", file=sys.stderr)
        sys.exit(1)

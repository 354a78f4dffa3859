"""`insitu sessions`: one's own sessions on the server."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from insitu._config import CONFIG
from insitu.backends.remote import RemoteBackend
from insitu.cli._console import console
from insitu_wire.errors import Error, PermissionDeniedError

if TYPE_CHECKING:
    import datetime

app = typer.Typer(help="Your sessions on the server.", invoke_without_command=True)

_Id = Annotated[str, typer.Argument(help="The session's id.")]


@app.callback()
def show(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="How many at most, the newest first.")] = 20,
    all_users: Annotated[
        bool, typer.Option("--all", help="Those of all users; for administrators.")
    ] = False,
) -> None:
    """Lists your sessions; or cancels one, or fetches what one saved."""
    if context.invoked_subcommand is not None:
        return
    from insitu._submission import sessions

    table = Table("session", "user", "model", "state", "accepted", "ended")
    for found in sessions(limit, all_users=all_users):
        times = (_local(found.created_at), _local(found.finished_at))
        table.add_row(found.id, found.user, found.model, found.state.lower(), *times)
    console().print(table)


@app.command()
def cancel(session_id: _Id) -> None:
    """Cancels a session of yours, or any for administrators; one that has ended stays as it is."""
    from insitu._submission import Submission

    submission = Submission(RemoteBackend(CONFIG), session_id)
    submission.cancel()
    try:
        submission.wait()
    except PermissionDeniedError:
        # An administrator's key cancels, and does not watch.
        print(f"{session_id} is being cancelled, unless it had ended")
        return
    except Error:
        pass
    print(f"{session_id} is {submission.status().lower()}")


@app.command()
def fetch(
    session_id: _Id,
    output: Annotated[
        Path | None, typer.Option(help="File for the saved values, as safetensors.")
    ] = None,
) -> None:
    """Shows what a session has saved, also one that failed or has not ended."""
    from insitu._submission import attach
    from insitu.cli._run import deliver

    deliver(attach(session_id).result(partial=True), output)


def _local(time: datetime.datetime | None) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M:%S}" if time else ""

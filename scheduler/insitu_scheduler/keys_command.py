"""`insitu keys`: makes, lists and revokes API keys, in the file that the scheduler reads."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from insitu_scheduler.keys import ROLES, Key, new_key, read_keys, tier_names, write_keys
from insitu_scheduler.limits import NAMES, Limits
from insitu_scheduler.terms import Tier
from insitu_wire.errors import Error, Reason, error

app = typer.Typer(
    name="insitu keys",
    help="API keys of a server: its scheduler reads them from the file, and again when it changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_File = Annotated[
    Path,
    typer.Option(
        "--file",
        envvar="INSITU_API_KEYS_FILE",
        help="The file that --api-keys-file of the scheduler names; made if it is missing.",
    ),
]


@app.command()
def create(
    user: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: _File,
    role: Annotated[str, typer.Option(help=f"One of {', '.join(ROLES)}.")] = "user",
    tier: Annotated[
        str, typer.Option(help=f"The most that sessions may ask for: {tier_names()}.")
    ] = "default",
    weight: Annotated[float, typer.Option(help="Share of the user beside others.")] = 1.0,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model that it is for, or a pattern with *; may be repeated."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=NUMBER with one of {', '.join(NAMES)}; may be repeated."),
    ] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(help="After how many days it is not accepted any more.")
    ] = None,
) -> None:
    """Makes a key and prints it, this once: the file has its hash alone."""
    text, key = new_key(
        user,
        role=_one_of("--role", role, ROLES),
        tier=Tier[_one_of("--tier", tier, [name.name.lower() for name in Tier]).upper()],
        weight=_above_zero("--weight", weight),
        models=tuple(model or ["*"]),
        limits=_limits(limit or []),
        expires_at=_expiry(expires_in_days),
    )
    with _locked(file):
        write_keys(file, [*(read_keys(file) if file.exists() else []), key])
    print(f"key {key.key_id} of {user}; it is not shown again:", file=sys.stderr)
    print(text)


@app.command(name="list")
def show(file: _File) -> None:
    """Lists the keys, by their ids."""
    table = Table("id", "user", "role", "tier", "weight", "models", "limits", "expires", "state")
    now = datetime.datetime.now(datetime.UTC)
    for key in read_keys(file):
        limits = ", ".join(f"{name}={bound:g}" for name, bound in key.limits.written().items())
        expiry = f"{key.expires_at:%Y-%m-%d}" if key.expires_at else ""
        tier, weight, models = key.tier.name.lower(), f"{key.weight:g}", " ".join(key.models)
        state = key.problem(now) or "accepted"
        table.add_row(key.key_id, key.user, key.role, tier, weight, models, limits, expiry, state)
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `insitu keys list` shows it.")],
    file: _File,
) -> None:
    """Revokes a key: the scheduler accepts it no more within a second."""
    with _locked(file):
        keys = read_keys(file)
        if key_id not in {key.key_id for key in keys}:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"{file} has no key {key_id!r}; `insitu keys list` shows their ids",
                keyId=key_id,
            )
        write_keys(file, [_revoked(key) if key.key_id == key_id else key for key in keys])
    print(f"key {key_id} is revoked")


def _revoked(key: Key) -> Key:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return dataclasses.replace(key, revoked_at=key.revoked_at or now)


def _locked(file: Path) -> FileLock:
    return FileLock(file.with_name(f"{file.name}.lock"))


def _limits(texts: list[str]) -> Limits:
    values: dict[str, object] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values[name] = float(number) if name.endswith("seconds") else int(number)
        except ValueError:
            raise _wrong("--limit", text, "NAME=NUMBER") from None
    try:
        return Limits.read(values)
    except ValueError as exception:
        raise error(Reason.INVALID_CONFIGURATION, f"--limit {exception}") from None


def _expiry(days: float | None) -> datetime.datetime | None:
    if days is None:
        return None
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return now + datetime.timedelta(days=_above_zero("--expires-in-days", days))


def _above_zero(flag: str, number: float) -> float:
    if not number > 0:
        raise _wrong(flag, number, "a number above 0")
    return number


def _one_of(flag: str, text: str, allowed: list[str] | tuple[str, ...]) -> str:
    if text not in allowed:
        raise _wrong(flag, text, f"one of {', '.join(allowed)}")
    return text


def _wrong(flag: str, value: object, allowed: str) -> Error:
    return error(
        Reason.INVALID_CONFIGURATION, f"{flag} is {value}; it must be {allowed}", setting=flag
    )


def main() -> None:
    """Runs the command; an error of ours is one message on standard error and exit status 1."""
    try:
        app()
    except Error as err:
        print(f"insitu keys: {err}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

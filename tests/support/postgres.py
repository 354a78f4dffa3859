"""A PostgreSQL of a test's own, where Debian's server programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOBODY = 65534


def _binaries() -> Path | None:
    """Gives the folder of PostgreSQL's server programs, which Debian does not put on the path."""
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


BINARIES = _binaries()
MISSING = "PostgreSQL's server is not installed; `make system-packages` does"


@contextmanager
def running() -> Iterator[str]:
    """Runs a server behind a socket in a folder, and gives its URL; it refuses to run as root."""
    assert BINARIES is not None
    # A socket's path is short, and a folder of pytest's is closed to other users.
    with tempfile.TemporaryDirectory(prefix="insitu-") as name:
        user = None
        if os.getuid() == 0:
            user = _NOBODY
            os.chown(name, user, -1)

        def run(program: str, *arguments: str) -> None:
            command = [str(BINARIES / program), "-D", f"{name}/data", *arguments]
            subprocess.run(command, user=user, cwd=name, check=True, timeout=120, stdout=-3)

        run("initdb", "-U", "insitu", "-A", "trust", "-N")
        options = f"-c listen_addresses= -c unix_socket_directories={name} -c fsync=off"
        run("pg_ctl", "-o", options, "-w", "-l", f"{name}/log", "start")
        try:
            yield f"postgresql://insitu@/postgres?host={name}"
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")

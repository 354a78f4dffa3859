"""Runs the real `insitu up` for tests, and sees that nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

INSITU = [sys.executable, "-c", "from insitu.cli import main; main()"]


@dataclass
class Up:
    """One `insitu up`; a context manager."""

    data_dir: Path
    models: list[str]
    flags: list[str] = field(default_factory=list)
    endpoint: str = ""

    def __enter__(self) -> Up:
        flags = ["--port", "0", "--data-dir", str(self.data_dir)]
        models = [flag for model in self.models for flag in ("--model", model)]
        self.log_path = self.data_dir / "up.log"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*INSITU, "up", *models, *self.flags, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("insitu is ready at 127.0.0.1:"), self.log
        self.endpoint = line.split()[-1]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What the server's processes have printed."""
        return self.log_path.read_text()

    @property
    def metrics_address(self) -> str:
        """Where the scheduler serves its metrics."""
        address: str = json.loads((self.data_dir / "scheduler.json").read_text())["metrics_address"]
        return address

    def next_line(self) -> str:
        """Waits for what it prints next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def descendants(self) -> list[psutil.Process]:
        """All processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Ends it as Ctrl-C does; gives the exit status, and fails if a process is left."""
        if self.process.poll() is None:
            started = self.descendants()
            self.process.terminate()
            self.process.wait(60)
            _, left = psutil.wait_procs(started, timeout=5)
            assert not left, f"left behind: {left}\n{self.log}"
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode


def ranks(
    processes: list[psutil.Process], number: int | None = None, model: str = ""
) -> list[psutil.Process]:
    """Those of some processes that are ranks of shard groups: of a number or model, if given."""
    title = re.compile(rf"insitu shard: rank {'[0-9]+' if number is None else number} of {model}")
    return [process for process in processes if title.match(" ".join(process.cmdline()))]


def interruptible(command: list[str]) -> subprocess.Popen[str]:
    """Starts a client whose events can be read, and which Ctrl-C reaches.

    It would not where the tests themselves run in the background of a shell.
    """
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def insitu(*arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the insitu command to its end."""
    return run_python([*INSITU, *arguments], timeout=timeout, **env)


def run_python(
    command: list[str], timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command and gives what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )

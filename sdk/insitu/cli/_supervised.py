"""A process of `insitu up` that is started again when it ends by itself."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

_PR_SET_PDEATHSIG = 1
# One that ran for longer has not failed at its start.
_STABLE_SECONDS = 60.0
_MAX_RESTARTS = 5
_MAX_PAUSE_SECONDS = 10.0


@dataclass(slots=True)
class SupervisedProcess:
    """One process, in a session of its own: Ctrl-C reaches `insitu up` alone, which ends it."""

    module: str
    """The Python module that it runs."""
    arguments: list[str]
    process: subprocess.Popen[bytes] = field(init=False)
    _started_at: float = field(init=False)
    _num_restarts: int = field(default=0, init=False)
    _starts_again_at: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts it."""
        self._starts_again_at = None
        self._started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def restart_if_ended(self, name: str) -> bool:
        """Starts it again if it has ended, after a pause that grows; False if it ends too often."""
        if self._starts_again_at is not None:
            if time.monotonic() >= self._starts_again_at:
                self.start()
            return True
        if (status := self.process.poll()) is None:
            return True
        if time.monotonic() - self._started_at > _STABLE_SECONDS:
            self._num_restarts = 0
        self._num_restarts += 1
        if self._num_restarts > _MAX_RESTARTS:
            return False
        pause = min(0.5 * 2**self._num_restarts, _MAX_PAUSE_SECONDS)
        self._starts_again_at = time.monotonic() + pause
        print(
            f"insitu up: {name} ended with status {status}; starting it again in {pause:g} s",
            file=sys.stderr,
            flush=True,
        )
        self.kill_rest()
        return True

    def stop(self, grace_seconds: float) -> None:
        """Ends it, by force if it does not end in time, and whatever is left of it."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            pid = self.process.pid
            print(f"insitu up: process {pid} does not end; killing it", file=sys.stderr)
        self.kill_rest()
        self.process.wait()

    def kill_rest(self) -> None:
        """Kills what is left of its process group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _end_with_parent() -> None:
    """Runs in the child: asks Linux for SIGTERM should `insitu up` itself be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

"""A process of a program that starts others, and starts them again when they end by themselves.

As `python -m insitu_wire.supervised` it is the beginning of such a process.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

_PR_SET_PDEATHSIG = 1
# One that ran for longer has not failed at its start.
_STABLE_SECONDS = 60.0
MAX_RESTARTS = 5
_MAX_PAUSE_SECONDS = 10.0


@dataclass(slots=True)
class SupervisedProcess:
    """One process, in a session of its own: Ctrl-C reaches the program alone, which ends it."""

    program: str
    """Who starts it, for messages."""
    module: str
    """The Python module that it runs."""
    arguments: list[str]
    max_restarts: float = MAX_RESTARTS
    """How often in a row it is started again."""
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    """Of its environment, beside those of this process; what must not be among its arguments."""
    process: subprocess.Popen[bytes] = field(init=False)
    _started_at: float = field(init=False)
    _num_restarts: int = field(default=0, init=False)
    _starts_again_at: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts it."""
        self._starts_again_at = None
        self._started_at = time.monotonic()
        self.process = subprocess.Popen(
            # What is to be done in the child is not done between fork and exec: threads of the
            # program, such as gRPC's, make that unsafe.
            [
                sys.executable,
                "-m",
                "insitu_wire.supervised",
                str(os.getpid()),
                self.module,
                *self.arguments,
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **self.variables},
        )

    @property
    def is_paused(self) -> bool:
        """Whether it has ended and is not started again yet."""
        return self._starts_again_at is not None

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
        if self._num_restarts > self.max_restarts:
            return False
        pause = min(0.5 * 2 ** min(self._num_restarts, 10), _MAX_PAUSE_SECONDS)
        self._starts_again_at = time.monotonic() + pause
        self._say(f"{name} ended with status {status}; starting it again in {pause:g} s")
        self.kill_rest()
        return True

    def stop(self, grace_seconds: float) -> None:
        """Ends it, by force if it does not end in time, and whatever is left of it."""
        self.terminate()
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._say(f"process {self.process.pid} does not end; killing it")
        self.kill_rest()
        self.process.wait()

    def _say(self, message: str) -> None:
        sys.stderr.write(f"{self.program}: {message}\n")
        sys.stderr.flush()

    def terminate(self) -> None:
        """Tells it to end."""
        if self.process.poll() is None:
            self.process.terminate()

    def kill_rest(self) -> None:
        """Kills what is left of its process group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _run(parent: int, module: str, arguments: list[str]) -> None:
    """Becomes a module, after it has asked Linux for SIGTERM should the program be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2], sys.argv[3:])

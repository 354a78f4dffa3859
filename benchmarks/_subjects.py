"""Starts benchmark subjects side by side, and a server for those that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent
NNSIGHT_PYTHON = ROOT.parent / ".venv-nnsight" / "bin" / "python"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Subject:
    """A worker process that runs one subject when it is told to."""

    def __init__(
        self,
        script: str,
        *arguments: object,
        python: Path | str = sys.executable,
        model: str,
        **env: str,
    ) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [str(python), str(ROOT / "workers" / script), model, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment | env,
        )
        self.result = self._answer()["result"]

    def seconds(self, name: str = "run") -> float:
        """Runs the subject once, or one of its runs."""
        self.begin(name)
        return self.end()

    def begin(self, name: str = "run") -> None:
        """Has the subject run, and does not wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()

    def end(self) -> float:
        """Waits for what was begun; gives the seconds that it took."""
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """Ends the worker."""
        self._process.communicate()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended; run it by hand to see why")
        return json.loads(line)


@contextmanager
def server(model: str, folder: Path | str, *, tp: int = 1) -> Iterator[str]:
    """Runs `insitu up` and gives its address."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-c", "from insitu.cli import main; main()", "up"]
        flags = ["--model", f"{model}={folder}", "--port", "0", "--data-dir", data]
        process = subprocess.Popen(
            [*command, *flags, "--tp", str(tp)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.communicate()


def machine() -> str:
    """Names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")
    return f"{os.cpu_count()} cores of {cpu}, no GPU"

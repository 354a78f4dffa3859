"""What `make demo` does: a server of its own with the demo model, one session on it, the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_INSITU = [sys.executable, "-c", "from insitu.cli import main; main()"]
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SCRIPT = Path(__file__).with_name("first_session.py")


def main() -> int:
    """Runs the demo; gives the exit status of the session's script."""
    prepared = subprocess.run([*_INSITU, "demo-model"], check=True, stdout=subprocess.PIPE)
    folder = prepared.stdout.decode().splitlines()[-1]
    with tempfile.TemporaryDirectory(prefix="insitu-demo-") as data:
        arguments = ["--model", f"{_MODEL}={folder}", "--port", "0", "--data-dir", data]
        with (
            (Path(data) / "server.log").open("w+") as log,
            subprocess.Popen(
                [*_INSITU, "up", *arguments], stdout=subprocess.PIPE, stderr=log, text=True
            ) as server,
        ):
            try:
                ready = server.stdout.readline().strip() if server.stdout else ""
                if not ready:
                    log.seek(0)
                    print(log.read(), file=sys.stderr)
                    return 1
                print(ready, flush=True)
                environment = {**os.environ, "INSITU_ENDPOINT": ready.rpartition(" ")[2]}
                return subprocess.run(
                    [sys.executable, str(_SCRIPT)], check=False, env=environment
                ).returncode
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait()


if __name__ == "__main__":
    sys.exit(main())

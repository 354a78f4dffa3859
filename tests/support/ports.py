"""Ports for processes that are told theirs before they start."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress

_FIRST, _EACH = 20_000, 1_000
# Below those that the system gives to whoever asks for any, and apart from other test processes'.
_START = _FIRST + _EACH * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_left = random.sample(range(_START, _START + _EACH), _EACH)


def free_port() -> int:
    """Gives a port of the loopback that nobody has, each once."""
    while True:
        port = _left.pop()
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port

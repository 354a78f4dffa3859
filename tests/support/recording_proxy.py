"""A TCP proxy that keeps every byte that crosses it, in both directions."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class RecordingProxy:
    """Listens on a free port and passes connections on to a target that may be set later."""

    def __init__(self) -> None:
        self.target = ""
        self.captured = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                host, _, port = self.target.partition(":")
                server = socket.create_connection((host, int(port)))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(65536):
                self.captured += data
                sink.sendall(data)

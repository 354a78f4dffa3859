"""A TCP proxy whose connections can be cut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class CutProxy:
    """Passes connections on to a target until it is told to cut them; new ones come through."""

    def __init__(self, target: str) -> None:
        """Begins to listen on a free port.

        Args:
            target: host:port; nobody has to listen there yet.
        """
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._num_left: int | None = None
        self.num_bytes = 0
        """How many have gone back to those who connected."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks all connections that are open, as a network does that fails."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _shut(end)

    def cut_after(self, num_bytes: int) -> None:
        """Cuts once so many more bytes have gone back."""
        self._num_left = num_bytes

    def close(self) -> None:
        """Takes no further connections, and breaks those that are open."""
        self._is_closed = True
        _shut(self._listener)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._is_closed:
            with suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        host, _, port = self._target.partition(":")
        with client:
            try:
                server = socket.create_connection((host, int(port)))
            except OSError:
                return
            with server:
                self._pass_both_ways(client, server)

    def _pass_both_ways(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._open |= {client, server}
        back = threading.Thread(target=self._pass_back, args=(server, client), daemon=True)
        back.start()
        _pass_on(client, server)
        back.join()
        with self._lock:
            self._open -= {client, server}

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        def count(data: bytes) -> None:
            self.num_bytes += len(data)
            if self._num_left is not None:
                self._num_left -= len(data)
                if self._num_left <= 0:
                    self._num_left = None
                    self.cut()

        _pass_on(server, client, count)


def _pass_on(
    source: socket.socket, sink: socket.socket, on_passed: Callable[[bytes], object] = len
) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
            on_passed(data)
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

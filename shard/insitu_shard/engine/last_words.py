"""Why ranks end, for those who lose them: what they could still say, or that they were killed.

A rank that loses another sees no more of it than a connection that broke.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any

from insitu_wire.errors import one_line

# Of a rank that ends because another did.
_NOTHING = "nothing"
_MAX_WORDS = 300


class LastWords:
    """A rank's own last words, and those of the others; without a store none are exchanged."""

    def __init__(self, store: Any = None, *, rank: int = 0, size: int = 1) -> None:
        """Makes them, and tells the others which process this rank is.

        Args:
            store: torch.distributed's, that all ranks of the group share and that outlives them.
            rank: this process's.
            size: how many ranks there are.
        """
        self.own = ""
        """Why this rank can not go on; empty if it can, or ends for the loss of another."""
        self._store = store
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._set(_process_of(rank), f"{socket.gethostname()} {os.getpid()}")

    def say(self, exception: BaseException) -> None:
        """Says that this rank can not go on, and why."""
        text = f"{type(exception).__name__}: {one_line(exception)}".removesuffix(": ")
        self.own = f"rank {self._rank} could not go on: {text[:_MAX_WORDS]}"
        self._set(_words_of(self._rank), self.own)

    def say_nothing(self) -> None:
        """Leaves word that it is for the loss of another that this rank ends."""
        if not self.own:
            self._set(_words_of(self._rank), _NOTHING)

    def take_back(self) -> None:
        """Has what was said count no more: the rank goes on."""
        self.own = ""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.delete_key(_words_of(self._rank))

    def heard(self, within_seconds: float) -> str:
        """Gives why other ranks have ended; empty if none is known to have, of itself.

        Args:
            within_seconds: how long to wait for one to be known; a process that was killed closes
                its connections before it is gone.
        """
        deadline = time.monotonic() + within_seconds
        while self._store is not None:
            if found := [why for rank in self._others if (why := self._end_of(rank))]:
                return "; ".join(found)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return ""

    def _end_of(self, rank: int) -> str:
        if words := self._get(_words_of(rank)):
            return "" if words == _NOTHING else words
        host, _, process = self._get(_process_of(rank)).rpartition(" ")
        if host != socket.gethostname() or _is_running(int(process)):
            return ""
        return f"rank {rank} was killed, as the system does where memory runs out"

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            # Where the store is gone nobody listens any more.
            with suppress(RuntimeError):
                self._store.set(key, value)

    def _get(self, key: str) -> str:
        with suppress(RuntimeError):
            # To get what is not there would wait for it.
            if self._store.check([key]):
                return str(self._store.get(key).decode())
        return ""


def _words_of(rank: int) -> str:
    return f"last words of rank {rank}"


def _process_of(rank: int) -> str:
    return f"process of rank {rank}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True

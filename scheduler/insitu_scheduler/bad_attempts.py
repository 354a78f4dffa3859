"""Who has shown wrong API keys lately. Pure: the clock is an argument."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

_MAX_PEERS = 10_000
_MAX_KNOWN = 1_000


@dataclass(slots=True)
class _Peer:
    level: float = 0.0
    """Wrong keys that have not been forgotten yet."""
    at: float = 0.0
    known: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Digests of keys that were right, the one used last at the end."""


class BadAttempts:
    """Bounds how often a peer may guess: some attempts at once, and so many a minute later.

    Keys that a peer has shown before and that were right go on to work: whoever guesses behind the
    same address locks nobody out who is there already.
    """

    def __init__(self, *, burst: int = 20, per_minute: float = 10.0) -> None:
        """Makes an empty record.

        Args:
            burst: how many wrong keys a peer may show at once.
            per_minute: how many of them are forgotten a minute.
        """
        self._burst = burst
        self._per_second = per_minute / 60
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def wait(self, peer: str, digest: bytes, *, now: float) -> float:
        """Gives the seconds until a peer may try a key; 0 if it may now."""
        record = self._peers.get(peer)
        if record is None or digest in record.known:
            return 0.0
        excess = self._level(record, now) + 1 - self._burst
        return max(excess, 0.0) / self._per_second

    def wrong(self, peer: str, *, now: float) -> None:
        """Takes note of a wrong key."""
        record = self._record(peer)
        record.level, record.at = self._level(record, now) + 1, now

    def right(self, peer: str, digest: bytes) -> None:
        """Takes note of a key that was right."""
        record = self._record(peer)
        record.known[digest] = None
        record.known.move_to_end(digest)
        if len(record.known) > _MAX_KNOWN:
            record.known.popitem(last=False)

    def _record(self, peer: str) -> _Peer:
        record = self._peers.setdefault(peer, _Peer())
        self._peers.move_to_end(peer)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)
        return record

    def _level(self, record: _Peer, now: float) -> float:
        return max(record.level - (now - record.at) * self._per_second, 0.0)

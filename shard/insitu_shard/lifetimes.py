"""Knows how long values stay that users keep beyond sessions. Pure: times are arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest


class Lifetimes:
    """When each kept value was used last, and which are in use now."""

    def __init__(self, seconds: float) -> None:
        """Makes an empty record.

        Args:
            seconds: how long a value stays after its last use.
        """
        self._seconds = seconds
        self._used_at: dict[tuple[str, str], float] = {}
        self._in_use: dict[str, frozenset[tuple[str, str]]] = {}

    def begin(self, key: str, request: RunSegmentRequest, *, now: float) -> None:
        """Takes note of the values that a segment keeps and loads; they stay until it ends.

        Args:
            key: the segment's.
            request: what it runs.
            now: the time.
        """
        self._in_use[key] = frozenset(_names(request))
        for name in self._in_use[key]:
            # One that is to go is used once more, and goes then.
            if self._used_at.get(name) != -math.inf:
                self._used_at[name] = now

    def end(self, key: str) -> None:
        """Takes note that a segment has ended."""
        self._in_use.pop(key, None)

    def forget(self, user: str, handle_id: str) -> bool:
        """Takes note that a value is to go; tells whether it can at once, for nobody uses it.

        If not, its time is over as soon as the last segment has ended that uses it.
        """
        name = (user, handle_id)
        if any(name in used for used in self._in_use.values()):
            self._used_at[name] = -math.inf
            return False
        self._used_at.pop(name, None)
        return True

    def expired(self, *, now: float) -> list[tuple[str, str]]:
        """Gives user and handle of the values whose time is over."""
        used = frozenset[tuple[str, str]]().union(*self._in_use.values())
        return [
            name
            for name, at in self._used_at.items()
            if now - at > self._seconds and name not in used
        ]


def _names(request: RunSegmentRequest) -> Iterator[tuple[str, str]]:
    for step in all_steps(request.segment.steps):
        for node in (*step.trace.nodes, *step.compute.nodes):
            if handle_id := node.keep.handle_id or node.load.handle_id:
                yield request.user, handle_id

"""Knows how long values stay that users keep beyond sessions. Pure: times are arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest


class Lifetimes:
    """When each kept value was used last."""

    def __init__(self, seconds: float) -> None:
        """Makes an empty record.

        Args:
            seconds: how long a value stays after its last use.
        """
        self._seconds = seconds
        self._used_at: dict[tuple[str, str], float] = {}

    def touch(self, request: RunSegmentRequest, *, now: float) -> None:
        """Takes note of the values that a segment keeps and loads."""
        for step in all_steps(request.segment.steps):
            for node in (*step.trace.nodes, *step.compute.nodes):
                if handle_id := node.keep.handle_id or node.load.handle_id:
                    self._used_at[request.user, handle_id] = now

    def forget(self, user: str, handle_id: str) -> None:
        """Takes note that a value is gone."""
        self._used_at.pop((user, handle_id), None)

    def expired(self, *, now: float) -> list[tuple[str, str]]:
        """Gives user and handle of the values whose time is over."""
        return [key for key, at in self._used_at.items() if now - at > self._seconds]

"""The connections to shard groups, open until the last session of a group has been released."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from insitu_scheduler.events import EventLog
    from insitu_scheduler.registry import Group, LeaseId, Registry
    from insitu_scheduler.shards import ShardClient

_RELEASE_SECONDS = 60.0
# From a group that is lost, or when the scheduler stops.
_QUICK_RELEASE_SECONDS = 2.0


class GroupLinks:
    """One open connection a group."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._clients: dict[LeaseId, ShardClient] = {}

    def add(self, group: Group, client: ShardClient) -> None:
        """Takes in the connection of a group that has just been granted its lease."""
        self._clients[group.lease_id] = client

    def __getitem__(self, group: Group) -> ShardClient:
        """Gives a group's connection."""
        return self._clients[group.lease_id]

    def find(self, lease_id: LeaseId) -> ShardClient | None:
        """Gives the connection of the group that holds a lease, if it is still held."""
        return self._clients.get(lease_id)

    def remove(self, group: Group) -> ShardClient | None:
        """Gives up a group that is lost; gives its connection if nobody needs it any more.

        Else the last of its sessions closes it, after all have released their values.
        """
        client = self._clients.pop(group.lease_id, None)
        return None if group.num_pinned else client

    async def release(
        self,
        log: EventLog,
        group: Group,
        client: ShardClient,
        *,
        seconds: float,
        handle_bytes: int,
    ) -> None:
        """Has a group free what a session left there, and gives back what was kept for it.

        Args:
            log: the session's.
            group: the group.
            client: its connection.
            seconds: what the session was expected to take there.
            handle_bytes: what of each rank's memory was kept for its values.
        """
        is_held = group.lease_id in self._registry and group.lease_id in self._clients
        timeout_seconds = _RELEASE_SECONDS if is_held else _QUICK_RELEASE_SECONDS
        try:
            await client.release(log.session_id, timeout_seconds=timeout_seconds)
        finally:
            self._registry.unpin(group, seconds, handle_bytes)
            if group.lease_id not in self._registry and not group.num_pinned:
                await client.close()

    async def close(self) -> None:
        """Closes all connections."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

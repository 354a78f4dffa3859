"""Draws a server's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from insitu_proto.v1.placement_pb2 import ShardGroupState

if TYPE_CHECKING:
    from insitu_proto.v1.scheduler_service_pb2 import GetServerStateResponse


def show_state(state: GetServerStateResponse, endpoint: str) -> None:
    """Prints the server's shard groups and queues."""
    console = Console()
    console.print(f"insitu {state.version} at {endpoint}")
    groups = Table("model", "group", "state", "ranks", "address", title="shard groups")
    for entry in state.groups:
        group = entry.group
        name = ShardGroupState.Name(entry.state).removeprefix("SHARD_GROUP_STATE_").lower()
        groups.add_row(group.model, group.group_id[:8], name, str(group.num_ranks), group.address)
    queues = Table("model", "waiting", "running", title="queues")
    for queue in state.queues:
        queues.add_row(queue.model, str(queue.num_waiting), str(queue.num_running))
    console.print(groups)
    console.print(queues)

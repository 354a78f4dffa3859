"""Draws a server's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from insitu_proto.v1.host_service_pb2 import HostedModelState
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
    if state.hosts:
        console.print(_hosts(state))
    console.print(queues)


def _hosts(state: GetServerStateResponse) -> Table:
    table = Table("host", "model", "state", "problem", title="models of hosts")
    for entry in state.hosts:
        room = f"{entry.host.host_id[:8]} (room for {entry.host.max_loaded})"
        for model in entry.models:
            name = HostedModelState.Name(model.state).removeprefix("HOSTED_MODEL_STATE_").lower()
            table.add_row(room, model.model, name, model.problem)
    return table

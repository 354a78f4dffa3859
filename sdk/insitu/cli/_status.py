"""Draws a server's state: once, or again and again."""

from __future__ import annotations

import datetime
import itertools
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table

from insitu.cli._console import console
from insitu_proto.v1.event_pb2 import EventKind
from insitu_proto.v1.host_service_pb2 import HostedModelState
from insitu_proto.v1.placement_pb2 import ShardGroupState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.duration_pb2 import Duration

    from insitu.backends.remote import RemoteBackend
    from insitu_proto.v1.scheduler_service_pb2 import GetServerStateResponse, SessionSummary

_MAX_SESSIONS = 10


def show_status(backend: RemoteBackend, endpoint: str) -> None:
    """Prints the server's shard groups and queues, and the user's newest sessions."""
    console().print(draw(backend.server_state(), list(backend.sessions(_MAX_SESSIONS)), endpoint))


def show_top(
    backend: RemoteBackend, endpoint: str, *, seconds: float, count: int, all_users: bool
) -> None:
    """Draws the same again and again, until Ctrl-C.

    Args:
        backend: the server.
        endpoint: its address.
        seconds: how long each picture stands.
        count: how many pictures there are; 0 for no end.
        all_users: whether the sessions of all users are shown.
    """
    shown = console()
    screen = Live(console=shown, auto_refresh=False, screen=shown.is_terminal)
    with suppress(KeyboardInterrupt), screen as live:
        for number in itertools.count(1):
            sessions = list(backend.sessions(_MAX_SESSIONS, all_users=all_users))
            live.update(draw(backend.server_state(), sessions, endpoint), refresh=True)
            if number == count:
                return
            time.sleep(seconds)


def draw(state: GetServerStateResponse, sessions: Sequence[SessionSummary], endpoint: str) -> Group:
    """Gives a picture of a server's state, with some sessions below."""
    drains = "; it drains: it takes no new sessions" if state.is_draining else ""
    head = f"insitu {state.version} at {endpoint}, as {state.user}{drains}"
    hosts = [_hosts(state)] if state.hosts else []
    return Group(head, _groups(state), *hosts, _queues(state), _sessions(sessions))


def _groups(state: GetServerStateResponse) -> Table:
    table = Table("model", "group", "state", "sessions", "ranks", "address", title="shard groups")
    for entry in state.groups:
        group = entry.group
        name = ShardGroupState.Name(entry.state).removeprefix("SHARD_GROUP_STATE_").lower()
        places = f"{entry.num_sessions} of {group.max_sessions or 1}"
        ranks = str(group.num_ranks)
        table.add_row(group.model, group.group_id[:8], name, places, ranks, group.address)
    return table


def _queues(state: GetServerStateResponse) -> Table:
    table = Table("model", "waiting", "running", "work that waits", "longest wait", title="queues")
    for queue in state.queues:
        counts = (str(queue.num_waiting), str(queue.num_running))
        age = _seconds(queue.oldest_age) if queue.HasField("oldest_age") else ""
        table.add_row(queue.model, *counts, _seconds(queue.backlog), age)
    return table


def _sessions(sessions: Sequence[SessionSummary]) -> Table:
    table = Table("session", "user", "model", "state", "accepted", title="newest sessions")
    for found in sessions:
        state = EventKind.Name(found.state).removeprefix("EVENT_KIND_").lower()
        accepted = f"{found.created_at.ToDatetime(tzinfo=datetime.UTC).astimezone():%H:%M:%S}"
        table.add_row(found.session_id, found.user, found.model, state, accepted)
    return table


def _seconds(duration: Duration) -> str:
    return f"{duration.ToTimedelta().total_seconds():.1f} s"


def _hosts(state: GetServerStateResponse) -> Table:
    table = Table("host", "model", "state", "problem", title="models of hosts")
    for entry in state.hosts:
        room = f"{entry.host.host_id[:8]} (room for {entry.host.max_loaded})"
        for model in entry.models:
            name = HostedModelState.Name(model.state).removeprefix("HOSTED_MODEL_STATE_").lower()
            table.add_row(room, model.model, name, model.problem)
    return table

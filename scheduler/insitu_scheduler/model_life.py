"""Decides which models the hosts have loaded, where there is less memory than models. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet


@dataclass(frozen=True, slots=True)
class Host:
    """A host and what it is to have loaded."""

    host_id: str
    models: tuple[str, ...]
    """Those that it can load, the most wanted first."""
    max_loaded: int
    """How many fit into its memory at once."""
    loaded: Mapping[str, float]
    """Those that it is to have loaded, and since when."""
    closing: frozenset[str] = frozenset()
    """Of these, those that take nothing new, and are unloaded once nothing runs there."""

    @property
    def open(self) -> frozenset[str]:
        """Those that take sessions, now or once they are there."""
        return frozenset(self.loaded) - self.closing


@dataclass(frozen=True, slots=True)
class Demand:
    """A session that waits."""

    models: frozenset[str]
    """What it needs, all at the same time."""
    since: float
    """When it began to wait."""


@dataclass(frozen=True, slots=True)
class Use:
    """How a loaded model is used."""

    num_running: int = 0
    """Sessions that run there, or have values there and go on later."""
    last_used_at: float = -math.inf
    keeps_values: bool = False
    """Whether users keep values there, which are lost with it."""


UNUSED = Use()


def plan(
    hosts: Sequence[Host],
    demands: Sequence[Demand],
    uses: Mapping[tuple[str, str], Use],
    *,
    elsewhere: AbstractSet[str],
    now: float,
    turn_seconds: float,
) -> list[Host]:
    """Says what each host is to have loaded from now on.

    What is asked for comes first, who waits longest before others. It takes free memory, else that
    of the model that nobody has used for longest; what runs or is asked for gives way only after it
    has had its turn, and never to those who wait less long. Memory that nobody asks for is used for
    models that may be asked for.

    Args:
        hosts: as they are.
        demands: sessions that wait; of those that wait for one model the first is enough.
        uses: by host and model; `UNUSED` for those that are not there.
        elsewhere: models that others serve.
        now: the time.
        turn_seconds: for how long a model that is in use keeps its memory while others wait.
    """
    planner = _Planner(hosts, uses, elsewhere, now, turn_seconds)
    planner.drop_closed()
    in_order = sorted(demands, key=lambda demand: demand.since)
    planner.wanted = frozenset[str]().union(*(demand.models for demand in demands))
    for demand in in_order:
        planner.serve(demand)
    planner.fill()
    return list(planner.hosts.values())


def can_hold(models: AbstractSet[str], hosts: Sequence[Host]) -> bool:
    """Whether hosts can have models loaded at the same time."""
    room = Counter({host.host_id: host.max_loaded for host in hosts})
    return _fit(sorted(models), hosts, room)


def _fit(models: Sequence[str], hosts: Sequence[Host], room: Counter[str]) -> bool:
    if not models:
        return True
    able = (host.host_id for host in hosts if models[0] in host.models and room[host.host_id])
    return any(_fit(models[1:], hosts, room - Counter({host_id: 1})) for host_id in able)


class _Planner:
    """Hosts on their way to what they are to be."""

    def __init__(
        self,
        hosts: Sequence[Host],
        uses: Mapping[tuple[str, str], Use],
        elsewhere: AbstractSet[str],
        now: float,
        turn_seconds: float,
    ) -> None:
        self.hosts = {host.host_id: host for host in hosts}
        self.wanted: frozenset[str] = frozenset()
        self._uses = uses
        self._elsewhere = elsewhere
        self._now = now
        self._turn_seconds = turn_seconds
        self._protected: frozenset[str] = frozenset()
        # Memory that will be free, and is spoken for.
        self._claimed: Counter[str] = Counter()

    def drop_closed(self) -> None:
        """Unloads what takes nothing new and runs nothing any more."""
        for host in list(self.hosts.values()):
            for model in host.closing:
                if not self._use(host, model).num_running:
                    self._unload(host.host_id, model)

    def serve(self, demand: Demand) -> None:
        """Has what a session needs loaded, or memory made for it."""
        self._protected |= demand.models
        for model in sorted(demand.models - self._there):
            self._load_somewhere(model)

    def fill(self) -> None:
        """Loads what may be asked for where memory is free."""
        for host in list(self.hosts.values()):
            for model in host.models:
                free = host.max_loaded - len(self.hosts[host.host_id].loaded)
                if free > self._claimed[host.host_id] and model not in self._there:
                    self._load(host.host_id, model)

    @property
    def _there(self) -> AbstractSet[str]:
        return frozenset(self._elsewhere).union(*(host.open for host in self.hosts.values()))

    def _use(self, host: Host, model: str) -> Use:
        return self._uses.get((host.host_id, model), UNUSED)

    def _load_somewhere(self, model: str) -> None:
        able = [
            host
            for host in self.hosts.values()
            if model in host.models and model not in host.loaded
        ]
        for host in able:
            if len(host.loaded) < host.max_loaded:
                self._load(host.host_id, model)
                return
        for host in able:
            if len(host.closing) > self._claimed[host.host_id]:
                self._claimed[host.host_id] += 1
                return
        self._make_room(able, model)

    def _make_room(self, able: Sequence[Host], model: str) -> None:
        candidates = [
            (self._is_in_use(host, other), self._use(host, other).last_used_at, host, other)
            for host in able
            for other in sorted(host.open - self._protected)
            if self._may_close(host, other)
        ]
        if not candidates:
            return
        _, _, host, other = min(candidates, key=lambda candidate: candidate[:2])
        if self._use(host, other).num_running:
            self._close(host.host_id, other)
            self._claimed[host.host_id] += 1
        else:
            self._unload(host.host_id, other)
            self._load(host.host_id, model)

    def _is_in_use(self, host: Host, model: str) -> bool:
        use = self._use(host, model)
        return bool(use.num_running) or use.keeps_values or model in self.wanted

    def _may_close(self, host: Host, model: str) -> bool:
        has_had_turn = self._now - host.loaded[model] >= self._turn_seconds
        return has_had_turn or not self._is_in_use(host, model)

    def _load(self, host_id: str, model: str) -> None:
        host = self.hosts[host_id]
        self.hosts[host_id] = replace(host, loaded={**host.loaded, model: self._now})

    def _unload(self, host_id: str, model: str) -> None:
        host = self.hosts[host_id]
        loaded = {name: since for name, since in host.loaded.items() if name != model}
        self.hosts[host_id] = replace(host, loaded=loaded, closing=host.closing - {model})

    def _close(self, host_id: str, model: str) -> None:
        host = self.hosts[host_id]
        self.hosts[host_id] = replace(host, closing=host.closing | {model})

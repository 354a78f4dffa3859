"""Owns what is known of hosts, and has them load and unload models as these are asked for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from insitu_proto.v1.host_service_pb2 import Host as HostMessage
from insitu_proto.v1.host_service_pb2 import HostedModel, HostedModelState
from insitu_proto.v1.scheduler_service_pb2 import HostState
from insitu_scheduler.model_life import Demand, Host, Use, can_hold, plan
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from insitu_proto.v1.host_service_pb2 import HostReport
    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.kept_values import KeptValues
    from insitu_scheduler.registry import Group, Registry

    Order = Callable[[frozenset[str]], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Registered:
    host: Host
    order: Order
    problems: dict[str, str] = field(default_factory=dict)


class Hosting:
    """The hosts that are registered. Touched from the event loop only."""

    def __init__(self, registry: Registry, queue: FairQueue, *, turn_seconds: float) -> None:
        """Makes it, without hosts.

        Args:
            registry: the shard groups.
            queue: the sessions that wait.
            turn_seconds: for how long a model that is in use keeps its memory while others wait.
        """
        self._registry = registry
        self._queue = queue
        self._turn_seconds = turn_seconds
        self._hosts: dict[str, _Registered] = {}
        self._last_used_at: dict[tuple[str, str], float] = {}
        self._texts: dict[str, str] = {}

    def add(self, host: Host, order: Order) -> None:
        """Takes in a host.

        Args:
            host: as it is.
            order: called with the models that it is to have loaded, whenever these change.
        """
        self._hosts[host.host_id] = _Registered(host, order)

    def remove(self, host_id: str) -> None:
        """Forgets a host; the shard groups that it started are known as long as they register."""
        self._hosts.pop(host_id, None)

    def report(self, host_id: str, report: HostReport) -> None:
        """Takes note of what went wrong at a host."""
        problems = {entry.model: entry.problem for entry in report.models if entry.problem}
        if host_id in self._hosts:
            self._hosts[host_id].problems = problems

    @property
    def models(self) -> frozenset[str]:
        """Those that some host can load."""
        return frozenset(model for at in self._hosts.values() for model in at.host.models)

    def check_together(self, models: Iterable[str]) -> None:
        """Refuses models that can not be loaded at the same time.

        Raises:
            CapacityError: OUT_OF_MEMORY.
        """
        hosted = frozenset(models) - self._elsewhere
        hosts = [at.host for at in self._hosts.values()]
        if len(hosted) > 1 and hosted <= self.models and not can_hold(hosted, hosts):
            room = sum(host.max_loaded for host in hosts)
            raise error(
                Reason.OUT_OF_MEMORY,
                f"the session uses {len(hosted)} models at the same time, and the server has "
                f"memory for {room}; use fewer models in one session, or ask whoever runs the "
                "server to raise --max-loaded",
                numModels=len(hosted),
                maxLoaded=room,
            )

    def review(self, kept: KeptValues, now: float) -> frozenset[str]:
        """Orders what is to be loaded now; gives the models of which there is news."""
        if not self._hosts:
            return frozenset()
        groups = [group for group in self._registry if group.host_id in self._hosts]
        hosts = plan(
            [at.host for at in self._hosts.values()],
            list(self._demands()),
            self._uses(groups, kept, now),
            elsewhere=self._elsewhere,
            now=now,
            turn_seconds=self._turn_seconds,
        )
        for host in hosts:
            self._become(host)
        for group in groups:
            if group.model not in self._hosts[group.host_id].host.open:
                group.is_draining = True
        return self._news()

    def text(self, models: Iterable[str | None]) -> str:
        """Says what a session waits for that needs some models; empty if these are there."""
        return "; ".join(filter(None, (self._texts.get(model or "") for model in models)))

    def states(self, may_see: Callable[[str], bool]) -> Iterator[HostState]:
        """Yields the hosts with the states of their models, of those that somebody may see."""
        for at in self._hosts.values():
            host = at.host
            message = HostMessage(host_id=host.host_id, max_loaded=host.max_loaded)
            models = [
                HostedModel(
                    model=model,
                    state=_STATES[self._state(host, model)],
                    problem=at.problems.get(model, ""),
                )
                for model in host.models
                if may_see(model)
            ]
            yield HostState(host=message, models=models)

    @property
    def _elsewhere(self) -> frozenset[str]:
        groups = [group for group in self._registry if group.host_id not in self._hosts]
        return frozenset(group.model for group in groups)

    def _demands(self) -> Iterator[Demand]:
        for model in self.models:
            if (oldest := self._queue.oldest(model)) is not None:
                yield Demand(frozenset(filter(None, oldest.models)), oldest.enqueued_at)

    def _uses(
        self, groups: Iterable[Group], kept: KeptValues, now: float
    ) -> dict[tuple[str, str], Use]:
        uses = {}
        for group in groups:
            key = group.host_id, group.model
            if group.num_pinned:
                self._last_used_at[key] = now
            uses[key] = Use(
                group.num_pinned,
                self._last_used_at.get(key, 0.0),
                keeps_values=kept.has_any(group.lease_id),
            )
        return uses

    def _become(self, host: Host) -> None:
        at = self._hosts[host.host_id]
        before, at.host = at.host, host
        if before.loaded.keys() != host.loaded.keys():
            _log.info("host %s is to have loaded: %s", host.host_id, ", ".join(host.loaded) or "-")
            at.order(frozenset(host.loaded))

    def _state(self, host: Host, model: str) -> str:
        is_there = any(
            group.host_id == host.host_id and group.model == model for group in self._registry
        )
        if model in host.open:
            return "LOADED" if is_there else "LOADING"
        return "UNLOADING" if is_there else "UNLOADED"

    def _news(self) -> frozenset[str]:
        texts = {model: self._text(model) for model in self.models}
        news = {model for model, text in texts.items() if text != self._texts.get(model, "")}
        self._texts = texts
        return frozenset(news)

    def _text(self, model: str) -> str:
        able = [at for at in self._hosts.values() if model in at.host.models]
        states = {self._state(at.host, model) for at in able}
        if "LOADED" in states or model in self._elsewhere:
            return ""
        if "LOADING" in states:
            problem = next(filter(None, (at.problems.get(model) for at in able)), "")
            return f"{model} is being loaded" + (f" again, after {problem}" if problem else "")
        return f"{model} is not loaded, and waits for memory that other models have"


_STATES = {
    name: HostedModelState.Value(f"HOSTED_MODEL_STATE_{name}")
    for name in ("UNLOADED", "LOADING", "LOADED", "UNLOADING")
}

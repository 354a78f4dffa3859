"""The groups of one session that runs: values at all of them, a place at one at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from insitu_scheduler.events import EventLog
    from insitu_scheduler.links import GroupLinks
    from insitu_scheduler.queue import WaitingSession
    from insitu_scheduler.registry import Group, LeaseId, Registry
    from insitu_scheduler.shards import ShardClient

_PAUSE_SECONDS = 0.05


class SessionPlaces:
    """Takes and gives back places as a session goes from group to group."""

    def __init__(
        self,
        registry: Registry,
        links: GroupLinks,
        waiting: WaitingSession,
        groups: Mapping[str, Group],
        *,
        on_change: Callable[[Group], None],
        on_moved: Callable[[], None],
        on_used: Callable[[float], None],
    ) -> None:
        """Takes a place at the first group; a session that runs alone takes one at all of them.

        Memory for its values is kept at all of them, until it is released: whoever has begun waits
        for no more of it, so that no two sessions wait for each other.

        Args:
            registry: has the groups.
            links: the connections to them.
            waiting: the session, which waits no more.
            groups: its groups, by model.
            on_change: called after a place was taken or given back.
            on_moved: called after it has left a place for another.
            on_used: called at each trace with the seconds that the session has taken so far.
        """
        self.used = on_used
        self._registry = registry
        self._links = links
        self._user = waiting.user
        self._is_alone = waiting.is_alone
        self._share = waiting.estimated_cost / len(groups)
        self._handle_bytes = waiting.handle_bytes
        self._groups = dict(groups)
        self._clients = {model: links[group] for model, group in groups.items()}
        self._on_change = on_change
        self._on_moved = on_moved
        self._taken: list[Group] = []
        self.here = next(iter(groups))
        """The model whose group it runs on, or ran on last."""
        for group in groups.values():
            registry.pin(group, self._share, self._handle_bytes)
        self.come_back()

    @property
    def leases(self) -> dict[str, LeaseId]:
        """The leases of its groups, by model."""
        return {model: group.lease_id for model, group in self._groups.items()}

    @property
    def clients(self) -> Mapping[str, ShardClient]:
        """The connections to its groups, by model."""
        return self._clients

    @property
    def has_place(self) -> bool:
        """Whether it has a place anywhere now."""
        return bool(self._taken)

    async def enter(self, model: str | None) -> None:
        """Goes on to the group of a model (None: of any, so it stays).

        A session that runs comes in wherever it has to, but not beside one that runs alone; one
        that has yielded its place waits for the next.
        """
        model = model or self.here
        while not self._taken or (model != self.here and self._groups[model].is_taken):
            if self._is_alone:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
        if self._is_alone:
            self.here = model
        elif model != self.here:
            self.leave()
            self.here = model
            self.come_back()
            self._on_moved()

    def leave(self) -> None:
        """Gives the place back; values stay."""
        taken, self._taken = self._taken, []
        for group in taken:
            self._registry.free(group, self._user)
            self._on_change(group)

    def come_back(self) -> None:
        """Takes a place where it was last."""
        groups = list(self._groups.values()) if self._is_alone else [self._groups[self.here]]
        for group in groups:
            self._registry.take(group, self._user, is_alone=self._is_alone)
            self._taken.append(group)
            self._on_change(group)

    def brought(self, content_hashes: Iterable[str]) -> None:
        """Takes note that the group where it is has some tensors now."""
        self._groups[self.here].brought(filter(None, content_hashes))

    def suspect(self) -> None:
        """Whichever group does not answer gets nothing more until it is heard of."""
        for group in self._groups.values():
            self._registry.suspect(group)

    async def release(self, log: EventLog) -> None:
        """Gives everything back: the values first, the place after them."""
        await asyncio.gather(*(self._release(log, model) for model in self._groups))
        self.leave()

    async def _release(self, log: EventLog, model: str) -> None:
        group = self._groups[model]
        try:
            await self._links.release(
                log,
                group,
                self._clients[model],
                seconds=self._share,
                handle_bytes=self._handle_bytes,
            )
        finally:
            if group in self._taken:
                self._taken.remove(group)
                self._registry.free(group, self._user)
            self._on_change(group)

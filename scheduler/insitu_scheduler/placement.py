"""Chooses the groups that run a session: of each model the one that is soonest done. Pure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from insitu_scheduler.registry import GroupState

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from insitu_scheduler.queue import SessionId, WaitingSession
    from insitu_scheduler.registry import Group, LeaseId, Registry


class Placement:
    """Finds groups for sessions that could start.

    A session starts with a place at a group of its first model; of each other model it gets a
    group where its values will be. It takes no place there before it runs there, so that nothing
    is held while another model's segment runs; then it comes in, whoever is there. Memory for its
    values, where that is bounded, it gets at all of them or at none.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # Groups that sessions which run alone wait for to be empty; nobody else comes in there.
        self._kept_clear: dict[SessionId, frozenset[LeaseId]] = {}
        # Groups of sessions that have found no memory there, in the order in which they came:
        # what becomes free is theirs before that of others.
        self._short: dict[SessionId, frozenset[LeaseId]] = {}

    def sated(self, model: str) -> frozenset[str]:
        """Gives the users who get no more of any of the groups of a model that have room."""
        ready = [group for group in self._registry.of(model) if group.state is GroupState.READY]
        users = [group.sated_users for group in ready]
        return frozenset.intersection(*users) if users else frozenset()

    def groups_for(
        self, waiting: WaitingSession, model: str, live: AbstractSet[SessionId]
    ) -> dict[str, Group] | None:
        """Gives the groups for a session, by model; None if it can not start now.

        Ask in the order in which sessions are due: for one that has to run alone groups are kept
        clear of those that come after it.

        Args:
            waiting: the session.
            model: which of the models with room it starts on, if it has none of its own.
            live: sessions that have not ended.
        """
        if not waiting.after.isdisjoint(live) or self._waits_elsewhere(waiting, model):
            return None
        names = [waiting.model or model, *sorted(waiting.others)]
        groups = {
            name: self._best(waiting, name, live, is_first=not at) for at, name in enumerate(names)
        }
        found = {name: group for name, group in groups.items() if group is not None}
        self._kept_clear.pop(waiting.session_id, None)
        if waiting.is_alone and not all(group.is_empty for group in found.values()):
            clear = frozenset(group.lease_id for group in found.values())
            self._kept_clear[waiting.session_id] = clear
            return None
        if len(found) < len(names):
            return None
        leases = frozenset(group.lease_id for group in found.values())
        if not waiting.is_alone and not all(
            self._has_memory(group, waiting, live) for group in found.values()
        ):
            self._short[waiting.session_id] = leases
            return None
        self._short.pop(waiting.session_id, None)
        return found

    def _best(
        self,
        waiting: WaitingSession,
        model: str,
        live: AbstractSet[SessionId],
        *,
        is_first: bool,
    ) -> Group | None:
        groups = [
            group
            for group in self._registry.of(model)
            if _is_possible(group, waiting, model)
            and (waiting.has_begun or not self._is_kept_clear(group, waiting, live))
        ]
        if waiting.is_alone:
            mine = self._kept_clear.get(waiting.session_id, frozenset())
            return min(
                groups,
                key=lambda group: (
                    not group.is_empty,
                    group.lease_id not in mine,
                    group.num_pinned,
                ),
                default=None,
            )
        if is_first:
            groups = [group for group in groups if _has_place(group, waiting.user)]
        return min(
            groups,
            key=lambda group: (
                not self._has_memory(group, waiting, live),
                group.predicted_seconds(waiting.uploads),
            ),
            default=None,
        )

    def _has_memory(
        self, group: Group, waiting: WaitingSession, live: AbstractSet[SessionId]
    ) -> bool:
        """Whether a session's values find room on a group, and nobody has waited for it longer."""
        if waiting.has_begun or not waiting.handle_bytes:
            return True
        self._short = {
            session_id: leases
            for session_id, leases in self._short.items()
            if session_id in live and all(lease_id in self._registry for lease_id in leases)
        }
        before = itertools.takewhile(lambda at: at != waiting.session_id, self._short)
        is_waited_for = any(group.lease_id in self._short[at] for at in before)
        return group.has_memory(waiting.handle_bytes) and not is_waited_for

    def _waits_elsewhere(self, waiting: WaitingSession, model: str) -> bool:
        """Whether a group of another model is kept clear for a session that any can run."""
        leases = self._kept_clear.get(waiting.session_id, frozenset())
        models = {group.model for group in self._registry if group.lease_id in leases}
        return waiting.model is None and bool(models - {model})

    def _is_kept_clear(
        self, group: Group, waiting: WaitingSession, live: AbstractSet[SessionId]
    ) -> bool:
        """Whether a group is kept for another session. One that has begun goes on there."""
        return any(
            group.lease_id in leases
            for session_id, leases in self._kept_clear.items()
            if session_id in live and session_id != waiting.session_id
        )


def _is_possible(group: Group, waiting: WaitingSession, model: str) -> bool:
    if model in waiting.pins and group.lease_id != waiting.pins[model]:
        return False
    return group.is_open or (waiting.has_begun and not group.is_taken)


def _has_place(group: Group, user: str) -> bool:
    has_room = group.num_sessions < group.max_sessions and not group.is_taken
    return has_room and user not in group.sated_users

"""Keeps the gauges of queues and groups true, and answers what people ask of them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_scheduler.registry import GroupState
from insitu_scheduler.service_levels import Shares, expected_wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from insitu_scheduler.fair_queue import FairQueue
    from insitu_scheduler.live_session import LiveSession
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.queue import SessionId, WaitingSession
    from insitu_scheduler.registry import Registry


@dataclass(frozen=True, slots=True)
class QueueState:
    """What a model's queue is like now."""

    num_waiting: int
    num_running: int
    oldest_age_seconds: float
    """How long the session has waited that waits longest; 0 if none does."""
    expected_wait_seconds: float
    """How long a new user's session would wait; infinite while no group serves the model."""


class Observer:
    """Watches the queue and the groups for the metrics and the status page."""

    def __init__(
        self,
        queue: FairQueue,
        registry: Registry,
        live: Mapping[SessionId, LiveSession],
        metrics: SchedulerMetrics,
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._live = live
        self._metrics = metrics
        self._shares: defaultdict[str | None, Shares] = defaultdict(Shares)
        metrics.refresh_by(self._refresh)

    def queue_changed(self, waiting: WaitingSession) -> None:
        """Takes note that a session came to wait, or does not wait any more."""
        for model in waiting.models:
            oldest = self._queue.oldest(model)
            self._metrics.queue_changed(
                model or "",
                self._queue.num_waiting(model),
                oldest.enqueued_at if oldest else None,
                self._queue.backlog(model),
            )

    def groups_changed(self, model: str) -> None:
        """Takes note that groups of a model came, went, or changed their state."""
        groups = [group for group in self._registry if group.model == model]
        states = Counter(group.state.value for group in groups)
        self._metrics.groups_changed(model, states, sum(group.num_sessions for group in groups))

    def served(self, waiting: WaitingSession, *, seconds: float) -> None:
        """Takes note of what a user's session has had of its models' groups."""
        for model in waiting.models:
            share = seconds / len(waiting.models)
            self._shares[model].add(waiting.user, share, now=time.monotonic())

    def state(self, model: str | None) -> QueueState:
        """Tells how a model's queue is."""
        groups = [group for group in self._registry if model in (None, group.model)]
        leases = {group.lease_id for group in groups}
        running = [live for live in self._live.values() if live.lease_ids & leases]
        oldest = self._queue.oldest(model)
        return QueueState(
            num_waiting=self._queue.num_waiting(model),
            num_running=len(running),
            oldest_age_seconds=time.monotonic() - oldest.enqueued_at if oldest else 0.0,
            expected_wait_seconds=expected_wait(
                cost_ahead=self._queue.cost_ahead(model),
                cost_running=sum(live.expected_cost for live in running),
                num_groups=sum(not group.is_draining for group in groups),
                has_room=any(group.state is GroupState.READY for group in groups),
            ),
        )

    def _refresh(self) -> None:
        now = time.monotonic()
        for model in {*self._queue.models, *self._registry.replicas()}:
            busy_since = self._queue.busy_since(model)
            self._metrics.show_queue(
                model or "",
                num_users=len(busy_since),
                expected_wait=self.state(model).expected_wait_seconds,
                fairness=self._shares[model].fairness(busy_since, now=now),
            )
        self._metrics.show_queue_bytes(sum(live.num_bytes for live in self._live.values()))

"""What the scheduler measures. Labels are few: models that were ever served, reasons, outcomes."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from insitu_wire.errors import Reason
    from insitu_wire.interceptor import Answer

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
    1800, 3600,
)  # fmt: skip


_SHORT_SECONDS = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1,
)  # fmt: skip


class SchedulerMetrics:
    """The metrics of one scheduler; sessions that any model's group can run have model ""."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._refreshers: list[Callable[[], None]] = []
        self._queue_latency = Histogram(
            "insitu_queue_latency_seconds",
            "Time from a session's acceptance to its dispatch to a shard group, or to its leaving "
            "the queue without.",
            ["model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._execution_latency = Histogram(
            "insitu_execution_latency_seconds",
            "Time from a session's dispatch to its end.",
            ["model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._duration = Histogram(
            "insitu_session_duration_seconds",
            "Time from a session's acceptance to its end, all attempts together.",
            ["model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._decision_seconds = Histogram(
            "insitu_decision_seconds",
            "Time that it took to find the next sessions for the free places of all groups.",
            buckets=_SHORT_SECONDS,
            registry=self.registry,
        )
        self._cost_ratio = Histogram(
            "insitu_cost_ratio",
            "What sessions cost, divided by what they were expected to cost.",
            ["model"],
            buckets=(0.1, 0.25, 0.5, 0.8, 1, 1.25, 2, 4, 10),
            registry=self.registry,
        )
        self._shard_seconds = Counter(
            "insitu_shard_seconds_total",
            "Time of shard groups that sessions were charged.",
            ["model"],
            registry=self.registry,
        )
        self._commit_seconds = Histogram(
            "insitu_journal_commit_seconds",
            "Time that a commit of the journal took.",
            buckets=_SECONDS[:15],
            registry=self.registry,
        )
        self._commit_failures = Counter(
            "insitu_journal_errors_total",
            "Commits of the journal that failed.",
            registry=self.registry,
        )
        self._pending = Gauge(
            "insitu_journal_pending",
            "Writes that wait for the journal's next commit.",
            registry=self.registry,
        )
        self._rpc_seconds = Histogram(
            "insitu_rpc_seconds",
            "Time that a call of a method took, streams to their end.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rpcs = Counter(
            "insitu_rpcs_total",
            "Calls that ended.",
            ["method", "code"],
            registry=self.registry,
        )
        self._result_bytes = Counter(
            "insitu_result_bytes_total",
            "Bytes of saved values that clients downloaded.",
            registry=self.registry,
        )
        self._accepted = self._counter("accepted", "Sessions that were accepted.", "model")
        self._finished = self._counter("finished", "Sessions that ended.", "model", "outcome")
        self._ran_again = self._counter(
            "ran_again", "Sessions that were queued again, for what ran them was lost.", "model"
        )
        self._rejected = self._counter("rejected", "Submissions that were refused.", "reason")
        self._auth_failures = Counter(
            "insitu_auth_failures_total",
            "Calls that were refused for their API key.",
            ["reason"],
            registry=self.registry,
        )
        self._leases = Counter(
            "insitu_leases_total",
            "Leases of shard groups, by what happened to them.",
            ["model", "event"],
            registry=self.registry,
        )
        self._queue_bytes = Gauge(
            "insitu_queue_bytes",
            "Size of the sessions that wait or run, as they were sent.",
            registry=self.registry,
        )
        self._queue_users = self._gauge(
            "insitu_queue_users", "Users of whom at least one session waits."
        )
        self._expected_wait = self._gauge(
            "insitu_queue_expected_wait_seconds",
            "How long a session would wait that a new user sent now; +Inf while no group serves.",
        )
        self._fairness = self._gauge(
            "insitu_fairness_ratio",
            "How evenly the users were served who waited all of the last minute: Jain's index, 1 "
            "if all got the same.",
        )
        self._queue_length = self._gauge("insitu_queue_sessions", "Sessions that wait.")
        self._oldest_age = self._gauge(
            "insitu_queue_oldest_age_seconds", "How long the session has waited that waits longest."
        )
        self._running = self._gauge("insitu_sessions_running", "Sessions that run.")
        self._backlog = self._gauge(
            "insitu_queue_backlog_seconds",
            "Time of a shard group that the waiting sessions are expected to take.",
        )
        self._groups = Gauge(
            "insitu_groups", "Shard groups.", ["model", "state"], registry=self.registry
        )
        self._ready_groups = self._gauge(
            "insitu_ready_groups", "Shard groups that could take a session."
        )
        self._upload_bytes = Gauge(
            "insitu_upload_store_bytes",
            "Disk that the tensors take that users uploaded.",
            registry=self.registry,
        )
        self._oldest: dict[str, float | None] = {}
        build = {"version": version, "python": platform.python_version()}
        self._epoch = Gauge(
            "insitu_leader_epoch",
            "How often a scheduler has begun to lead, if this one does; 0 while it stands by.",
            registry=self.registry,
        )
        Info("insitu_build", "What runs.", registry=self.registry).info(build)

    def leads(self, epoch: int) -> None:
        """Takes note that this scheduler leads, for the how-manieth time of all schedulers."""
        self._epoch.set(epoch)

    def accepted(self, model: str) -> None:
        """Counts a session that is in the journal."""
        self._accepted.labels(model).inc()

    def ran_again(self, model: str) -> None:
        """Counts a session whose group was lost and that waits for another."""
        self._ran_again.labels(model).inc()

    def rejected(self, reason: Reason) -> None:
        """Counts a submission that was refused."""
        self._rejected.labels(reason).inc()

    def refused(self, reason: Reason) -> None:
        """Counts a call that was refused for its API key."""
        self._auth_failures.labels(reason).inc()

    def waited(self, model: str, outcome: str, seconds: float) -> None:
        """Records how long a session waited; outcome is "dispatched", "cancelled" or "error"."""
        self._queue_latency.labels(model, outcome).observe(seconds)

    def decided(self, seconds: float) -> None:
        """Records how long it took to find what runs next."""
        self._decision_seconds.observe(seconds)

    def lease_changed(self, model: str, event: str) -> None:
        """Counts what happens to a lease: "granted", "replaced", "ended" or "expired"."""
        self._leases.labels(model, event).inc()

    def executed(self, model: str, outcome: str, seconds: float) -> None:
        """Records how long a session ran."""
        self._execution_latency.labels(model, outcome).observe(seconds)

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        """Counts a session that ended; outcome is "completed", "error" or "cancelled"."""
        self._finished.labels(model, outcome).inc()
        self._duration.labels(model, outcome).observe(seconds)

    def charged(self, model: str, *, seconds: float) -> None:
        """Records what a session's turn cost."""
        self._shard_seconds.labels(model).inc(seconds)

    def cost_known(self, model: str, *, expected: float, seconds: float) -> None:
        """Records how far what a session cost was from what was expected."""
        self._cost_ratio.labels(model).observe(seconds / expected)

    def committed(self, seconds: float, *, has_failed: bool) -> None:
        """Records a commit of the journal; called on its thread."""
        self._commit_seconds.observe(seconds)
        if has_failed:
            self._commit_failures.inc()

    def answered(self, answer: Answer) -> None:
        """Records a call."""
        self._rpcs.labels(answer.method, answer.code).inc()
        self._rpc_seconds.labels(answer.method).observe(answer.seconds)

    def downloaded(self, num_bytes: int) -> None:
        """Counts bytes of saved values."""
        self._result_bytes.inc(num_bytes)

    def queue_changed(
        self, model: str, num_waiting: int, oldest_at: float | None, backlog_seconds: float
    ) -> None:
        """Records a queue: its length, since when (monotonic) its oldest waits, its cost."""
        self._queue_length.labels(model).set(num_waiting)
        self._backlog.labels(model).set(backlog_seconds)
        if model not in self._oldest:
            self._oldest_age.labels(model).set_function(lambda: self._age(model))
        self._oldest[model] = oldest_at

    def show_queue(
        self, model: str, *, num_users: int, expected_wait: float, fairness: float
    ) -> None:
        """Records what of a queue is found out when somebody asks."""
        self._queue_users.labels(model).set(num_users)
        self._expected_wait.labels(model).set(expected_wait)
        self._fairness.labels(model).set(fairness)

    def show_queue_bytes(self, num_bytes: int) -> None:
        """Records the size of the sessions that have not ended."""
        self._queue_bytes.set(num_bytes)

    def refresh_by(self, refresh: Callable[[], None]) -> None:
        """Has something called before each scrape, on the event loop."""
        self._refreshers.append(refresh)

    def refresh(self) -> None:
        """Brings up to date what is found out only when somebody asks."""
        for refresh in self._refreshers:
            refresh()

    def watch_journal(self, num_pending: Callable[[], float]) -> None:
        """Shows how many writes wait for the journal; asked at each scrape."""
        self._pending.set_function(num_pending)

    def watch_uploads(self, num_bytes: Callable[[], float]) -> None:
        """Shows how much disk the uploads take; asked at each scrape."""
        self._upload_bytes.set_function(num_bytes)

    def groups_changed(self, model: str, states: Mapping[str, int], num_sessions: int) -> None:
        """Records how many groups of a model are in each state, and how many sessions they run."""
        for state in ("READY", "BUSY", "DRAINING"):
            self._groups.labels(model, state.lower()).set(states.get(state, 0))
        self._ready_groups.labels(model).set(states.get("READY", 0))
        self._running.labels(model).set(num_sessions)

    def _age(self, model: str) -> float:
        """Gives the age at the time of a scrape."""
        oldest_at = self._oldest[model]
        return time.monotonic() - oldest_at if oldest_at is not None else 0.0

    def _counter(self, verb: str, text: str, *labels: str) -> Counter:
        return Counter(f"insitu_sessions_{verb}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model"], registry=self.registry)

"""What a shard group measures."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
)

from insitu_shard.rank_report import RankReport

if TYPE_CHECKING:
    from insitu_shard.engine.pool import PassReport
    from insitu_shard.group import GroupReport
    from insitu_wire.interceptor import Answer

_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
    1800, 3600,
)  # fmt: skip


class ShardMetrics:
    """The metrics of one group; its leader serves them."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._model = model
        self.segment_seconds = Histogram(
            "insitu_shard_segment_seconds",
            "Time that a segment ran.",
            ["model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._traces = Counter(
            "insitu_shard_traces_total",
            "Traces that were started.",
            ["model"],
            registry=self.registry,
        )
        self._segments = Gauge(
            "insitu_shard_segments_running",
            "Segments of sessions that run beside each other.",
            ["model"],
            registry=self.registry,
        )
        self._pass_seconds = Histogram(
            "insitu_shard_pass_seconds",
            "Time that a forward pass took, with what traces do in it.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._pass_traces = Histogram(
            "insitu_shard_pass_traces",
            "Traces that shared a forward pass.",
            ["model"],
            buckets=_COUNTS,
            registry=self.registry,
        )
        self._pass_sessions = Histogram(
            "insitu_shard_pass_sessions",
            "Sessions that shared a forward pass.",
            ["model"],
            buckets=_COUNTS[:6],
            registry=self.registry,
        )
        self._pass_rows = Histogram(
            "insitu_shard_pass_rows",
            "Rows of a forward pass where it is widest.",
            ["model"],
            buckets=_COUNTS,
            registry=self.registry,
        )
        self._busy = Counter(
            "insitu_shard_busy_seconds_total",
            "Time in which the engine ran segments.",
            ["model"],
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
            "insitu_rpcs_total", "Calls that ended.", ["method", "code"], registry=self.registry
        )
        self._layers = Counter(
            "insitu_shard_layers_total",
            "Decoder layers, counted once a row: those that ran, and those that one pass a trace "
            "would have run beside.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self._load_seconds = Gauge(
            "insitu_shard_load_seconds",
            "Time that loading the model took.",
            ["model"],
            registry=self.registry,
        )
        self._handles = self._gauge(
            "insitu_shard_handles", "Values that sessions and users keep here."
        )
        self._handle_bytes = self._gauge(
            "insitu_shard_handle_bytes", "Memory of the values that sessions and users keep here."
        )
        self._session_bytes = self._gauge(
            "insitu_shard_session_bytes",
            "Memory of the values that sessions keep here, without what users keep.",
        )
        self._kept_bytes = self._gauge(
            "insitu_shard_kept_bytes",
            "Memory of the values of the user who keeps most beyond sessions.",
        )
        self._kept_limit = self._gauge(
            "insitu_shard_kept_limit_bytes", "How much a user may keep beyond sessions."
        )
        self._handle_limit = self._gauge(
            "insitu_shard_handle_limit_bytes",
            "How much memory the values of all sessions may take, without what users keep.",
        )
        self._upload_bytes = self._gauge(
            "insitu_shard_upload_cache_bytes",
            "Memory of each rank that the tensors take that users brought.",
        )
        self._rank_memory = Gauge(
            "insitu_shard_rank_memory_bytes",
            "Memory of a rank's GPU, or of its process: what is used, and all that there is.",
            ["model", "rank", "kind"],
            registry=self.registry,
        )
        self._rank_cpu = self._rank_counter(
            "insitu_shard_rank_cpu_seconds_total", "CPU time of a rank's process."
        )
        self._collective_seconds = self._rank_counter(
            "insitu_shard_collective_seconds_total",
            "Time that a rank spent in collectives inside of passes; on GPUs, in starting them.",
        )
        self._collectives = self._rank_counter(
            "insitu_shard_collectives_total", "Collectives inside of passes."
        )
        self._last_reports: list[RankReport] = []
        build = {"version": importlib.metadata.version("insitu"), "torch": torch.__version__}
        build["python"] = platform.python_version()
        Info("insitu_shard_build", "What runs.", registry=self.registry).info(build)

    def loaded(self, seconds: float, *, kept_limit_bytes: int, handle_limit_bytes: int) -> None:
        """Records how long loading took, and how much may be kept."""
        self._load_seconds.labels(self._model).set(seconds)
        self._kept_limit.labels(self._model).set(kept_limit_bytes)
        self._handle_limit.labels(self._model).set(handle_limit_bytes)

    def answered(self, answer: Answer) -> None:
        """Records a call."""
        self._rpcs.labels(answer.method, answer.code).inc()
        self._rpc_seconds.labels(answer.method).observe(answer.seconds)

    def was_busy(self, seconds: float) -> None:
        """Records that segments ran."""
        self._busy.labels(self._model).inc(seconds)

    def reported(self, report: GroupReport) -> None:
        """Records what the group is like."""
        for gauge, level in (
            (self._handles, report.num_handles),
            (self._handle_bytes, report.handle_bytes),
            (self._session_bytes, report.session_bytes),
            (self._kept_bytes, report.kept_bytes),
            (self._upload_bytes, report.upload_bytes),
        ):
            gauge.labels(self._model).set(level)
        last = self._last_reports or [RankReport(0, 0, 0, 0, 0)] * len(report.ranks)
        for rank, (now, before) in enumerate(zip(report.ranks, last, strict=True)):
            self._rank_memory.labels(self._model, rank, "used").set(now.used_bytes)
            self._rank_memory.labels(self._model, rank, "total").set(now.total_bytes)
            for counter, more in (
                (self._rank_cpu, now.cpu_seconds - before.cpu_seconds),
                (self._collective_seconds, now.collective_seconds - before.collective_seconds),
                (self._collectives, now.num_collectives - before.num_collectives),
            ):
                counter.labels(self._model, rank).inc(more)
        self._last_reports = report.ranks

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model"], registry=self.registry)

    def _rank_counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model", "rank"], registry=self.registry)

    def pass_ran(self, report: PassReport) -> None:
        """Records a pass."""
        self._pass_seconds.labels(self._model).observe(report.seconds)
        self._pass_traces.labels(self._model).observe(len(report.plan.traces))
        self._pass_sessions.labels(self._model).observe(report.num_segments)
        self._pass_rows.labels(self._model).observe(report.plan.num_rows)
        self._layers.labels(self._model, "run").inc(report.plan.layers_run)
        self._layers.labels(self._model, "saved").inc(max(0, report.plan.layers_saved))

    def segments_running(self, count: int) -> None:
        """Records how many segments run."""
        self._segments.labels(self._model).set(count)

    def trace_started(self) -> None:
        """Counts a trace."""
        self._traces.labels(self._model).inc()

    def segment_ended(self, outcome: str, seconds: float) -> None:
        """Counts a segment; outcome is "completed", "failed" or "cancelled"."""
        self.segment_seconds.labels(self._model, outcome).observe(seconds)

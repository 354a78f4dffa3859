"""What a shard group measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

if TYPE_CHECKING:
    from insitu_shard.engine import HandleStore
    from insitu_shard.engine.pool import PassReport
    from insitu_shard.upload_cache import UploadCache

_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 300, 600)


class ShardMetrics:
    """The metrics of one group; its leader serves them."""

    def __init__(self, model: str, handles: HandleStore, uploads: UploadCache) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
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
        num_handles = Gauge(
            "insitu_shard_handles",
            "Values that sessions and users keep here.",
            ["model"],
            registry=self.registry,
        )
        num_handles.labels(model).set_function(lambda: handles.num_values)
        handle_bytes = Gauge(
            "insitu_shard_handle_bytes",
            "Memory of the values that sessions keep here.",
            ["model"],
            registry=self.registry,
        )
        handle_bytes.labels(model).set_function(lambda: handles.num_bytes)
        upload_bytes = Gauge(
            "insitu_shard_upload_cache_bytes",
            "Memory of each rank that the tensors take that users brought.",
            ["model"],
            registry=self.registry,
        )
        upload_bytes.labels(model).set_function(lambda: uploads.num_bytes)

    def loaded(self, seconds: float) -> None:
        """Records how long loading took."""
        self._load_seconds.labels(self._model).set(seconds)

    def pass_ran(self, report: PassReport) -> None:
        """Records a pass."""
        self._pass_seconds.labels(self._model).observe(report.seconds)
        self._pass_traces.labels(self._model).observe(len(report.plan.traces))
        self._pass_sessions.labels(self._model).observe(report.num_segments)
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

"""What a shard group measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from insitu_shard.engine import HandleStore
    from insitu_shard.upload_cache import UploadCache

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 300, 600)


class ShardMetrics:
    """The metrics of one group; its leader serves them."""

    def __init__(self, model: str, handles: HandleStore, uploads: UploadCache) -> None:
        self.registry = CollectorRegistry()
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

    def trace_started(self) -> None:
        """Counts a trace."""
        self._traces.labels(self._model).inc()

    def segment_ended(self, outcome: str, seconds: float) -> None:
        """Counts a segment; outcome is "completed", "failed" or "cancelled"."""
        self.segment_seconds.labels(self._model, outcome).observe(seconds)

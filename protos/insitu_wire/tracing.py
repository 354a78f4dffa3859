"""Spans of OpenTelemetry through client, scheduler and shard, where an endpoint is set.

Without `OTEL_EXPORTER_OTLP_ENDPOINT`, or without the extra `insitu[otel]`, nothing is made.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

METADATA_KEY = "traceparent"
"""Metadata key that carries the span of the caller, as the W3C has it."""


class Tracing:
    """Makes the spans of one program."""

    def __init__(self, service: str) -> None:
        """Makes it; nothing is imported before the first span.

        Args:
            service: name of the program, unless OTEL_SERVICE_NAME is set.
        """
        self._service = service

    @contextmanager
    def span(
        self, name: str, parent: str = "", *, start_ns: int | None = None, **attributes: object
    ) -> Iterator[str]:
        """Spans what is done inside, and gives what names the span to others.

        Args:
            name: of the span.
            parent: what names its parent; empty for the one that is current, if any is.
            start_ns: when it began, in nanoseconds since 1970; by default now.
            attributes: shown as `insitu.` and their names.
        """
        if self._tracer is None:
            yield parent
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(
            name,
            propagator.extract({METADATA_KEY: parent}) if parent else None,
            start_time=start_ns,
            attributes={f"insitu.{key}": str(value) for key, value in attributes.items()},
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, trace.set_span_in_context(span))
        try:
            yield carrier[METADATA_KEY]
        except BaseException as exception:
            # The name alone: messages may have what is the user's own.
            span.set_status(trace.StatusCode.ERROR, type(exception).__name__)
            raise
        finally:
            span.end()

    @cached_property
    def _tracer(self) -> Any:
        if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            _log.warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, and OpenTelemetry is not installed: "
                "pip install 'insitu[otel]'"
            )
            return None
        name = os.environ.get("OTEL_SERVICE_NAME") or self._service
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return provider.get_tracer("insitu")

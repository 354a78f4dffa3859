"""A tiny receiver of OpenTelemetry's spans."""

from __future__ import annotations

import time
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass
class SpanReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that programs export to it; a context manager."""

    spans: list[tuple[str, Any]] = field(default_factory=list)
    """The program's name, and the span."""
    endpoint: str = ""

    def __enter__(self) -> SpanReceiver:
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(None).wait()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {
                pair.key: pair.value.string_value for pair in resource.resource.attributes
            }
            for scope in resource.scope_spans:
                self.spans += [(attributes["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace_of(self, session_id: str) -> bytes:
        """Gives the trace in which a session ran, once that is told."""
        for _ in range(300):
            for _, span in list(self.spans):
                about = {pair.key: pair.value.string_value for pair in span.attributes}
                if span.name == "insitu.run" and about["insitu.session_id"] == session_id:
                    trace_id: bytes = span.trace_id
                    return trace_id
            time.sleep(0.1)
        raise AssertionError(f"no span of session {session_id} came")

    def wait_for(self, trace_id: bytes, names: set[str]) -> dict[str, tuple[str, Any]]:
        """Gives the spans of a trace by their names, once all of some names are there."""
        for _ in range(300):
            found = {
                span.name: (service, span)
                for service, span in list(self.spans)
                if span.trace_id == trace_id
            }
            if names <= found.keys():
                return found
            time.sleep(0.1)
        raise AssertionError(f"{names - found.keys()} did not come; {found.keys()} did")

"""The app's own part in requests that the mesh traces: a span between the sidecar's and those of the calls."""

import os

from fastapi import Request
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from chain import SERVICE

_w3c = TraceContextTextMapPropagator()


def new_provider() -> trace.TracerProvider:
    """Sends spans to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names; without one there are no spans of the app."""
    if not os.getenv("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return trace.NoOpTracerProvider()
    provider = new_sdk()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def new_sdk() -> TracerProvider:
    # The mesh decides what is traced.
    return TracerProvider(sampler=sampling.ParentBased(sampling.ALWAYS_OFF), resource=Resource({"service.name": SERVICE}))


def start(provider: trace.TracerProvider, request: Request) -> trace.Span:
    """The span of a request, with the sidecar's as its parent. A request without W3C's header has none."""
    parent = _w3c.extract(request.headers)
    if not trace.get_current_span(parent).get_span_context().is_valid:
        return trace.INVALID_SPAN
    return provider.get_tracer(SERVICE).start_span(
        request.method, parent, trace.SpanKind.SERVER, {"http.request.method": request.method})


def end(span: trace.Span, method: str, path: str, status: int) -> None:
    span.update_name(f"{method} {path}")
    span.set_attributes({"http.route": path, "http.response.status_code": status})
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)
    span.end()

"""Sends a trace through each exporter of OpenTelemetry's SDK for Python, and one of py_zipkin. Prints which ones."""

import json
import os
import urllib.request

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GRPC
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HTTP
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags
from py_zipkin import Encoding, Kind
from py_zipkin.zipkin import zipkin_client_span, zipkin_span

LINKED = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True, TraceFlags(1))


def opentelemetry(name: str, exporter) -> None:
    provider = TracerProvider(resource=Resource({"service.name": f"python-{name}", "host.name": "node-1"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("clients", "1.0")
    with tracer.start_as_current_span("parent", kind=SpanKind.SERVER, attributes={"http.response.status_code": 503, "text": "ä<&>\""}) as parent:
        with tracer.start_as_current_span("child", kind=SpanKind.CLIENT, links=[Link(LINKED, {"a": "b"})]) as child:
            child.set_attributes({"yes": True, "ratio": 0.25, "list": ["a", "b"], "numbers": [1, 2], "empty": ""})
            child.add_event("retried", {"attempt": 2})
            child.set_status(StatusCode.ERROR, "it broke")
        print(json.dumps({"kind": "opentelemetry", "service": f"python-{name}", "trace": f"{parent.get_span_context().trace_id:032x}"}))
    if not provider.force_flush():
        raise SystemExit(f"{name}: the spans were not taken")
    provider.shutdown()


def zipkin(name: str, encoding: Encoding, content_type: str) -> None:
    def send(message: bytes | str) -> None:
        message = message if isinstance(message, bytes) else message.encode()
        request = urllib.request.Request(os.environ["ZIPKIN"] + "/api/v2/spans", message, {"Content-Type": content_type})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 202, answer.status

    with zipkin_span(service_name=f"python-{name}", span_name="parent", transport_handler=send, sample_rate=100, encoding=encoding, kind=Kind.SERVER,
                     use_128bit_trace_id=True, binary_annotations={"http.status_code": "503"}) as parent:
        with zipkin_client_span(service_name=f"python-{name}", span_name="child", annotations={"retried": 1_700_000_000.0}):
            pass
        print(json.dumps({"kind": "zipkin", "service": f"python-{name}", "trace": parent.zipkin_attrs.trace_id}))


opentelemetry("grpc", GRPC(endpoint=os.environ["GRPC"], insecure=True))
opentelemetry("http", HTTP(endpoint=os.environ["HTTP"] + "/v1/traces"))
opentelemetry("http-gzip", HTTP(endpoint=os.environ["HTTP"] + "/v1/traces", compression=Compression.Gzip))
zipkin("zipkin", Encoding.V2_JSON, "application/json")
zipkin("zipkin-protobuf", Encoding.V2_PROTO3, "application/x-protobuf")

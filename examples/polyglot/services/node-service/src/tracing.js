// The app's own part in requests that the mesh traces: a span between the sidecar's and those of the calls.
import { ROOT_CONTEXT, SpanKind, SpanStatusCode, defaultTextMapGetter, defaultTextMapSetter, isSpanContextValid, trace } from "@opentelemetry/api";
import { W3CTraceContextPropagator } from "@opentelemetry/core";
import { OTLPTraceExporter } from "@opentelemetry/exporter-trace-otlp-proto";
import { resourceFromAttributes } from "@opentelemetry/resources";
import { AlwaysOffSampler, BatchSpanProcessor, ParentBasedSampler, TracerProvider } from "@opentelemetry/sdk-trace";

import { SERVICE } from "./log.js";

const w3c = new W3CTraceContextPropagator();

// createTracing sends spans to the collector at OTEL_EXPORTER_OTLP_ENDPOINT. Without one there are no spans of the app.
export function createTracing(environment, processor) {
  if (!processor && environment.OTEL_EXPORTER_OTLP_ENDPOINT) processor = new BatchSpanProcessor({ exporter: new OTLPTraceExporter() });
  if (!processor) return { start: () => undefined, stop: async () => {} };
  const provider = new TracerProvider({
    resource: resourceFromAttributes({ "service.name": SERVICE }),
    sampler: new ParentBasedSampler({ root: new AlwaysOffSampler() }), // the mesh decides what is traced
    spanProcessors: [processor],
  });
  const tracer = provider.getTracer(SERVICE);
  return {
    // start returns a request's span, with the sidecar's as its parent. A request without W3C's header has none.
    start(request, path) {
      const parent = w3c.extract(ROOT_CONTEXT, request.headers, defaultTextMapGetter);
      if (!isSpanContextValid(trace.getSpanContext(parent) ?? {})) return undefined;
      const attributes = { "http.request.method": request.method, "http.route": path };
      return tracer.startSpan(`${request.method} ${path}`, { kind: SpanKind.SERVER, attributes }, parent);
    },
    stop: () => provider.shutdown(),
  };
}

export function endSpan(span, status) {
  span?.setAttribute("http.response.status_code", status);
  if (status >= 500) span?.setStatus({ code: SpanStatusCode.ERROR });
  span?.end();
}

// parentHeaders makes the app's own span, where there is one, the parent of a call.
export function parentHeaders(span) {
  const headers = {};
  if (span) w3c.inject(trace.setSpan(ROOT_CONTEXT, span), headers, defaultTextMapSetter);
  return headers;
}

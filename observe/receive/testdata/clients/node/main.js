// Sends a trace through each exporter of OpenTelemetry's SDK for JavaScript, one of zipkin-js, and one of Jaeger's own client. Prints which ones.
import { ROOT_CONTEXT, SpanKind, SpanStatusCode, trace } from "@opentelemetry/api";
import { OTLPLogExporter } from "@opentelemetry/exporter-logs-otlp-http";
import { OTLPTraceExporter as GRPC } from "@opentelemetry/exporter-trace-otlp-grpc";
import { OTLPTraceExporter as JSONExporter } from "@opentelemetry/exporter-trace-otlp-http";
import { OTLPTraceExporter as Proto } from "@opentelemetry/exporter-trace-otlp-proto";
import { ZipkinExporter } from "@opentelemetry/exporter-zipkin";
import { resourceFromAttributes } from "@opentelemetry/resources";
import { BatchLogRecordProcessor, LoggerProvider } from "@opentelemetry/sdk-logs";
import { BatchSpanProcessor, TracerProvider } from "@opentelemetry/sdk-trace";
import jaegerClient from "jaeger-client";
import { BatchRecorder, ExplicitContext, Tracer, jsonEncoder } from "zipkin";
import { HttpLogger } from "zipkin-transport-http";

const { GRPC: grpc, HTTP: http, ZIPKIN: zipkin, JAEGER: jaeger } = process.env;
const print = (line) => console.log(JSON.stringify(line));

async function opentelemetry(kind, name, exporter) {
  const service = `node-${name}`;
  const provider = new TracerProvider({
    resource: resourceFromAttributes({ "service.name": service, "host.name": "node-1" }),
    spanProcessors: [new BatchSpanProcessor({ exporter })],
  });
  const tracer = provider.getTracer("clients", "1.0");
  const parent = tracer.startSpan("parent", { kind: SpanKind.SERVER, attributes: { "http.response.status_code": 503, text: 'ä<&>"' } }, ROOT_CONTEXT);
  const linked = { traceId: "0af7651916cd43dd8448eb211c80319c", spanId: "b7ad6b7169203331", traceFlags: 1 };
  const child = tracer.startSpan("child", { kind: SpanKind.CLIENT, links: [{ context: linked, attributes: { a: "b" } }] }, trace.setSpan(ROOT_CONTEXT, parent));
  child.setAttributes({ yes: true, ratio: 0.25, list: ["a", "b"], numbers: [1, 2], empty: "" });
  child.addEvent("retried", { attempt: 2 });
  child.setStatus({ code: SpanStatusCode.ERROR, message: "it broke" });
  child.end();
  parent.end();
  print({ kind, service, trace: parent.spanContext().traceId });
  await provider.forceFlush();
  await provider.shutdown();
}

async function logs() {
  const provider = new LoggerProvider({
    resource: resourceFromAttributes({ "service.name": "node-logs", "k8s.namespace.name": "shop" }),
    processors: [new BatchLogRecordProcessor({ exporter: new OTLPLogExporter({ url: `${http}/v1/logs` }) })],
  });
  provider.getLogger("clients").emit({ severityText: "WARN", body: "it is late", attributes: { "http.route": "/a" } });
  print({ kind: "log", service: "node-logs" });
  await provider.forceFlush();
  await provider.shutdown();
}

async function zipkinJS() {
  const sent = new Promise((resolve, reject) => {
    const logger = new HttpLogger({ endpoint: `${zipkin}/api/v2/spans`, jsonEncoder: jsonEncoder.JSON_V2, httpInterval: 100, log: { error: reject } });
    logger.on("success", resolve);
    const tracer = new Tracer({ ctxImpl: new ExplicitContext(), recorder: new BatchRecorder({ logger }), localServiceName: "node-zipkin-js", traceId128Bit: true });
    tracer.local("parent", () => {
      tracer.recordBinary("http.status_code", "503");
      tracer.local("child", () => tracer.recordMessage("retried"));
      print({ kind: "zipkin-local", service: "node-zipkin-js", trace: tracer.id.traceId });
    });
  });
  const alive = setInterval(() => {}, 1000); // the logger's own timer does not keep the process
  await sent;
  clearInterval(alive);
}

async function jaegerJS() {
  const logger = { info() {}, error: (text) => { throw new Error(text); } };
  const tracer = jaegerClient.initTracer({
    serviceName: "node-jaeger-js", traceId128bit: true, sampler: { type: "const", param: 1 }, reporter: { collectorEndpoint: `${jaeger}/api/traces` },
  }, { logger, tags: { "host.name": "node-1" } });
  const parent = tracer.startSpan("parent", { tags: { "span.kind": "server", "http.status_code": 503, text: 'ä<&>"' } });
  const child = tracer.startSpan("child", { childOf: parent, tags: { "span.kind": "client", error: true } });
  child.log({ event: "retried", attempt: 2 });
  child.finish();
  parent.finish();
  print({ kind: "jaeger", service: "node-jaeger-js", trace: parent.context().traceIdStr });
  await new Promise((done) => tracer.close(done));
}

await opentelemetry("opentelemetry", "grpc", new GRPC({ url: `http://${grpc}` }));
await opentelemetry("opentelemetry", "json", new JSONExporter({ url: `${http}/v1/traces` }));
await opentelemetry("opentelemetry", "protobuf", new Proto({ url: `${http}/v1/traces`, compression: "gzip" }));
await opentelemetry("otel-zipkin", "otel-zipkin", new ZipkinExporter({ url: `${zipkin}/api/v2/spans` }));
await logs();
await zipkinJS();
await jaegerJS();

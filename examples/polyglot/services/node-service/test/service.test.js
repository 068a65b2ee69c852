import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { test } from "node:test";
import { setImmediate as turn } from "node:timers/promises";

import { InMemorySpanExporter, SimpleSpanProcessor } from "@opentelemetry/sdk-trace";

import { createService } from "../src/service.js";
import { traceHeaders, traceOf } from "../src/trace.js";
import { createTracing } from "../src/tracing.js";

const TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async function listen(server) {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return `http://127.0.0.1:${server.address().port}`;
}

async function start(t, options) {
  const service = createService(options);
  const url = await listen(service.server);
  t.after(() => service.close());
  return { url, close: () => service.close() };
}

test("answers", async (t) => {
  const { url } = await start(t);
  assert.deepEqual(await (await fetch(url + "/health")).json(), { status: "healthy" });
  assert.deepEqual(await (await fetch(url + "/ready")).json(), { status: "ready" });
  assert.equal((await fetch(url + "/nowhere")).status, 404);
  assert.equal((await fetch(url + "/toString")).status, 404);
  assert.equal((await fetch(url + "/api/v1/chain", { method: "POST" })).status, 405);
});

test("the trace of a request", () => {
  assert.deepEqual(traceOf({ traceparent: TRACEPARENT, "x-b3-traceid": "a" }), { id: "4bf92f3577b34da6a3ce929d0e0e4736", span: "00f067aa0ba902b7" });
  assert.deepEqual(traceOf({ "x-b3-traceid": "a", "x-b3-spanid": "b" }), { id: "a", span: "b" });
  assert.deepEqual(traceOf({ traceparent: "nonsense" }), { id: "", span: "" });
  assert.deepEqual(traceHeaders({ traceparent: TRACEPARENT, cookie: "secret", "x-request-id": "r" }), { traceparent: TRACEPARENT, "x-request-id": "r" });
});

test("the chain passes the trace on", async (t) => {
  let seen;
  const next = createServer((request, response) => {
    seen = request.headers;
    response.end(JSON.stringify({ chain: [{ service: "next" }] }));
  });
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const { url } = await start(t, { nextUrl });

  const headers = { traceparent: TRACEPARENT, tracestate: "a=b", "x-request-id": "r", "x-b3-sampled": "1", cookie: "secret" };
  const { chain } = await (await fetch(url + "/api/v1/chain", { headers })).json();
  assert.deepEqual(chain.map((link) => link.service), ["node-service", "next"]);
  assert.equal(chain[0].trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  for (const name of ["traceparent", "tracestate", "x-request-id", "x-b3-sampled"]) assert.equal(seen[name], headers[name], name);
  assert.equal(seen.cookie, undefined);
});

test("the app's span stands between the one that the sidecar sent and the one of the call", { timeout: 30_000 }, async (t) => {
  let seen;
  const next = createServer((request, response) => {
    seen = request.headers;
    response.end(JSON.stringify({ chain: [] }));
  });
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const spans = new InMemorySpanExporter();
  const { url } = await start(t, { nextUrl, tracing: createTracing({}, new SimpleSpanProcessor({ exporter: spans })) });
  const ask = async (headers) => (await fetch(url + "/api/v1/chain", { headers })).text();

  await ask({});
  await ask({ traceparent: TRACEPARENT.replace(/1$/, "0") });
  assert.deepEqual(spans.getFinishedSpans(), []);
  await ask({ traceparent: TRACEPARENT });
  // The span ends when the server's side of the response is closed.
  while (spans.getFinishedSpans().length === 0) await turn();
  const [span] = spans.getFinishedSpans();
  assert.equal(spans.getFinishedSpans().length, 1);
  assert.equal(span.name, "GET /api/v1/chain");
  assert.equal(span.parentSpanContext.spanId, "00f067aa0ba902b7");
  assert.equal(seen.traceparent, `00-4bf92f3577b34da6a3ce929d0e0e4736-${span.spanContext().spanId}-01`);
});

test("a chain that is broken", async (t) => {
  const next = createServer((request, response) => response.writeHead(503).end("overloaded"));
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const { url } = await start(t, { nextUrl });
  const response = await fetch(url + "/api/v1/chain");
  assert.equal(response.status, 502);
  assert.match((await response.json()).error, /503 overloaded/);

  const alone = await start(t);
  assert.equal((await (await fetch(alone.url + "/api/v1/chain")).json()).chain.length, 1);
});

test("a stream of events", async (t) => {
  const { url } = await start(t);
  const response = await fetch(url + "/api/v1/events?count=3&interval_ms=10", { headers: { "last-event-id": "41" } });
  assert.equal(response.headers.get("content-type"), "text/event-stream");
  const text = await response.text();
  assert.deepEqual([...text.matchAll(/^id: (\d+)$/gm)].map((match) => match[1]), ["42", "43", "44"]);
  for (const query of ["count=0", "count=x", "interval_ms=1"]) {
    assert.equal((await fetch(url + "/api/v1/events?" + query)).status, 400, query);
  }
});

test("closing ends the streams and finishes requests", async (t) => {
  const answered = withResolvers();
  const called = withResolvers();
  const next = createServer(async (request, response) => {
    called.resolve();
    await answered.promise;
    response.end(JSON.stringify({ chain: [] }));
  });
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const service = createService({ nextUrl });
  const url = await listen(service.server);

  const stream = await fetch(url + "/api/v1/events?interval_ms=60000");
  const pending = fetch(url + "/api/v1/chain");
  await called.promise;
  const closed = service.close();
  assert.match(await stream.text(), /^id: 1$/m); // it has an end
  answered.resolve();
  assert.equal((await pending).status, 200);
  await closed;
  await assert.rejects(fetch(url + "/health"));
});

test("metrics", async (t) => {
  const { url } = await start(t);
  for (let i = 0; i < 3; i++) await (await fetch(url + "/api/v1/chain")).text();
  await (await fetch(url + "/nowhere")).text();
  const text = await (await fetch(url + "/metrics")).text();
  assert.match(text, /http_requests_total\{method="GET",path="\/api\/v1\/chain",status="200"\} 3/);
  assert.match(text, /http_requests_total\{method="GET",path="",status="404"\} 1/);
  assert.match(text, /http_request_duration_seconds_count\{method="GET",path="\/api\/v1\/chain"\} 3/);
  assert.doesNotMatch(text, /path="\/health"/);
});

function withResolvers() {
  let resolve;
  const promise = new Promise((done) => { resolve = done; });
  return { promise, resolve };
}

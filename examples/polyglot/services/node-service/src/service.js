// The I/O-heavy part of the app: it keeps many streams of events open, and costs next to nothing while they are quiet.
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";

import { Counter, Histogram, Registry } from "prom-client";

import { SERVICE, error, info } from "./log.js";
import { traceHeaders, traceOf } from "./trace.js";
import { createTracing, endSpan, parentHeaders } from "./tracing.js";

const CALL_TIMEOUT_MS = 10_000;

// createService returns the server, and close, which lets it finish what it has begun. nextUrl is whom the chain calls.
export function createService({ nextUrl, tracing = createTracing({}) } = {}) {
  const metrics = createMetrics();
  const stopping = new AbortController();

  const routes = {
    "/health": (request, response) => json(response, 200, { status: "healthy" }),
    "/ready": (request, response) => json(response, 200, { status: "ready" }),
    "/metrics": async (request, response) => {
      response.writeHead(200, { "content-type": metrics.registry.contentType });
      response.end(await metrics.registry.metrics());
    },
    "/api/v1/events": (request, response, url) => sendEvents(request, response, url, stopping.signal, metrics.streams),
    "/api/v1/chain": (request, response, url, span) => chain(request, response, nextUrl, span),
  };
  const quiet = new Set(["/health", "/ready", "/metrics"]);

  const server = createServer(async (request, response) => {
    const url = new URL(request.url, "http://localhost");
    const route = Object.hasOwn(routes, url.pathname) ? routes[url.pathname] : undefined;
    const start = process.hrtime.bigint();
    let span;
    if (!quiet.has(url.pathname)) {
      const path = route ? url.pathname : "";
      span = tracing.start(request, path);
      // A client that goes away closes the response as well.
      response.once("close", () => {
        endSpan(span, response.statusCode);
        observe(request, response, path, start, metrics);
      });
    }
    try {
      if (!route) return json(response, 404, { error: "no such path" });
      if (request.method !== "GET") return json(response, 405, { error: "only GET" }, { allow: "GET" });
      await route(request, response, url, span);
    } catch (failure) {
      error(String(failure), { trace_id: traceOf(request.headers).id });
      if (response.headersSent) return response.destroy();
      json(response, 500, { error: "internal error" });
    }
  });
  // The sidecar keeps idle connections to the app for an hour. A request that is sent into a connection which the app
  // closes is lost; here the sidecar closes first.
  server.keepAliveTimeout = 3_900_000;

  return {
    server,
    async close() {
      const closed = new Promise((resolve) => server.close(resolve));
      stopping.abort(); // ends the streams
      server.closeIdleConnections();
      // A connection becomes idle when its last request is answered.
      const idle = setInterval(() => server.closeIdleConnections(), 100);
      await closed;
      clearInterval(idle);
      await tracing.stop();
    },
  };
}

function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  return {
    registry,
    requests: new Counter({ name: "http_requests_total", help: "Requests that were answered", labelNames: ["method", "path", "status"], registers }),
    duration: new Histogram({ name: "http_request_duration_seconds", help: "Time until the answer", labelNames: ["method", "path"], registers }),
    streams: new Counter({ name: "events_sent_total", help: "Events sent to all streams", registers }),
  };
}

function observe(request, response, path, start, metrics) {
  const seconds = Number(process.hrtime.bigint() - start) / 1e9;
  const trace = traceOf(request.headers);
  metrics.requests.inc({ method: request.method, path, status: response.statusCode });
  metrics.duration.observe({ method: request.method, path }, seconds);
  info("request", {
    method: request.method, path, status: response.statusCode, duration_ms: Math.round(seconds * 1e6) / 1e3,
    trace_id: trace.id, span_id: trace.span, request_id: request.headers["x-request-id"] ?? "",
  });
}

function json(response, status, body, headers = {}) {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(body));
}

// sendEvents sends server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): count of them, or
// without end. A client that comes back says with Last-Event-ID where it was.
async function sendEvents(request, response, url, stopping, sent) {
  const count = number(url, "count", Infinity, 1, 1_000_000);
  const interval = number(url, "interval_ms", 1000, 10, 60_000);
  if (count === undefined || interval === undefined) {
    return json(response, 400, { error: "count is 1 to 1000000, interval_ms 10 to 60000" });
  }
  const last = Number(request.headers["last-event-id"] ?? 0);
  const first = Number.isSafeInteger(last) && last > 0 ? last + 1 : 1;
  const gone = new AbortController();
  response.once("close", () => gone.abort());
  const end = AbortSignal.any([stopping, gone.signal]);

  response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
  for (let id = first; id < first + count && !end.aborted; id++) {
    const event = `id: ${id}\nevent: tick\ndata: ${JSON.stringify({ time: new Date().toISOString() })}\n\n`;
    sent.inc();
    // A slow reader is waited for, so that nothing piles up here.
    if (!response.write(event)) await drained(response, end);
    if (id + 1 < first + count) await sleep(interval, undefined, { signal: end }).catch(() => {});
  }
  response.end(); // the browser's EventSource connects again, to a pod that stays
}

function number(url, name, otherwise, min, max) {
  if (!url.searchParams.has(name)) return otherwise;
  const value = Number(url.searchParams.get(name));
  return Number.isInteger(value) && value >= min && value <= max ? value : undefined;
}

function drained(response, end) {
  return new Promise((resolve) => {
    response.once("drain", resolve);
    end.addEventListener("abort", resolve, { once: true });
  });
}

// chain asks the next service and puts itself before what that answers.
async function chain(request, response, nextUrl, span) {
  const self = { service: SERVICE, language: "JavaScript", work: "waited for the next", trace_id: traceOf(request.headers).id };
  if (!nextUrl) return json(response, 200, { chain: [self] });
  let answer;
  try {
    const called = await fetch(nextUrl + "/api/v1/chain", {
      headers: { ...traceHeaders(request.headers), ...parentHeaders(span) },
      signal: AbortSignal.timeout(CALL_TIMEOUT_MS),
    });
    if (!called.ok) throw new Error(`${called.status} ${await called.text()}`);
    answer = await called.json();
  } catch (failure) {
    return json(response, 502, { error: `${SERVICE} calls ${nextUrl}: ${failure.message}` });
  }
  json(response, 200, { chain: [self, ...answer.chain] });
}

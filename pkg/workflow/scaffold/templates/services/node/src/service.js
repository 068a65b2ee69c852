// What the service answers.
import { createServer } from "node:http";

import { Counter, Histogram, Registry } from "prom-client";

import { SERVICE, error, info } from "./log.js";
import { traceHeaders, traceOf } from "./trace.js";

const CALL_TIMEOUT_MS = 10_000;

// createService returns the server, and close, which lets it finish what it has begun. nextUrl is whom it asks for each
// request; no one if it is empty.
export function createService({ message = "hello", nextUrl = "" } = {}) {
  const metrics = createMetrics();

  const routes = {
    "/health": (request, response) => json(response, 200, { status: "healthy" }),
    "/ready": (request, response) => json(response, 200, { status: "ready" }),
    "/metrics": async (request, response) => {
      response.writeHead(200, { "content-type": metrics.registry.contentType });
      response.end(await metrics.registry.metrics());
    },
    "/service-name": (request, response) => answer(request, response, message, nextUrl),
  };
  // What asks for these are machines, every few seconds: neither logged nor counted.
  const quiet = new Set(["/health", "/ready", "/metrics"]);

  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    const route = Object.hasOwn(routes, pathname) ? routes[pathname] : undefined;
    const start = process.hrtime.bigint();
    // A client that goes away closes the response as well.
    if (!quiet.has(pathname)) response.once("close", () => observe(request, response, route ? pathname : "", start, metrics));
    try {
      if (!route) return json(response, 404, { error: "no such path" });
      if (request.method !== "GET") return json(response, 405, { error: "only GET" }, { allow: "GET" });
      await route(request, response);
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
      server.closeIdleConnections();
      // A connection becomes idle when its last request is answered.
      const idle = setInterval(() => server.closeIdleConnections(), 100);
      await closed;
      clearInterval(idle);
    },
  };
}

async function answer(request, response, message, nextUrl) {
  const body = { service: SERVICE, message };
  if (nextUrl) {
    try {
      body.next = await ask(nextUrl, request);
    } catch (failure) {
      return json(response, 502, { error: `${SERVICE} asks ${nextUrl}: ${failure.message}` });
    }
  }
  json(response, 200, body);
}

// ask asks the next service on behalf of a request.
async function ask(url, request) {
  const response = await fetch(url, { headers: traceHeaders(request.headers), signal: AbortSignal.timeout(CALL_TIMEOUT_MS) });
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return response.json();
}

function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  return {
    registry,
    requests: new Counter({ name: "http_requests_total", help: "Requests that were answered", labelNames: ["method", "path", "status"], registers }),
    duration: new Histogram({ name: "http_request_duration_seconds", help: "Time until the answer", labelNames: ["method", "path"], registers }),
  };
}

// observe counts and logs a request. The path is the route's: what clients make up would be metrics without end.
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

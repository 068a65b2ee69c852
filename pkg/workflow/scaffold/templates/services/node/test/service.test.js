import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { test } from "node:test";

import { createService } from "../src/service.js";
import { traceHeaders, traceOf } from "../src/trace.js";

const TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async function listen(server) {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return `http://127.0.0.1:${server.address().port}`;
}

async function start(t, options) {
  const service = createService(options);
  t.after(() => service.close());
  return listen(service.server);
}

test("answers", async (t) => {
  const url = await start(t, { message: "good day" });
  assert.deepEqual(await (await fetch(url + "/health")).json(), { status: "healthy" });
  assert.deepEqual(await (await fetch(url + "/ready")).json(), { status: "ready" });
  assert.deepEqual(await (await fetch(url + "/service-name")).json(), { service: "service-name", message: "good day" });
  assert.equal((await fetch(url + "/nowhere")).status, 404);
  assert.equal((await fetch(url + "/toString")).status, 404);
  assert.equal((await fetch(url + "/service-name", { method: "POST" })).status, 405);
});

test("the trace of a request", () => {
  assert.deepEqual(traceOf({ traceparent: TRACEPARENT, "x-b3-traceid": "a" }), { id: "4bf92f3577b34da6a3ce929d0e0e4736", span: "00f067aa0ba902b7" });
  assert.deepEqual(traceOf({ "x-b3-traceid": "a", "x-b3-spanid": "b" }), { id: "a", span: "b" });
  assert.deepEqual(traceOf({ traceparent: "nonsense" }), { id: "", span: "" });
  assert.deepEqual(traceHeaders({ traceparent: TRACEPARENT, cookie: "secret", "x-request-id": "r" }), { traceparent: TRACEPARENT, "x-request-id": "r" });
});

test("asks the next service and passes the trace on", async (t) => {
  let seen;
  let status = 200;
  const next = createServer((request, response) => {
    seen = request.headers;
    response.writeHead(status).end(JSON.stringify({ service: "next" }));
  });
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const url = await start(t, { nextUrl });

  const headers = { traceparent: TRACEPARENT, tracestate: "a=b", "x-request-id": "r", "x-b3-sampled": "1", cookie: "secret" };
  const answer = await (await fetch(url + "/service-name", { headers })).json();
  assert.deepEqual(answer.next, { service: "next" });
  for (const name of ["traceparent", "tracestate", "x-request-id", "x-b3-sampled"]) assert.equal(seen[name], headers[name], name);
  assert.equal(seen.cookie, undefined);

  status = 503;
  const broken = await fetch(url + "/service-name");
  assert.equal(broken.status, 502);
  assert.match((await broken.json()).error, /503/);
});

test("closing finishes requests", async (t) => {
  const next = createServer();
  const nextUrl = await listen(next);
  t.after(() => next.close());
  const service = createService({ nextUrl });
  const url = await listen(service.server);

  const pending = fetch(url + "/service-name");
  const [, response] = await once(next, "request");
  const closed = service.close();
  response.end(JSON.stringify({ service: "next" }));
  assert.equal((await pending).status, 200);
  await closed;
  await assert.rejects(fetch(url + "/health"));
});

test("metrics", async (t) => {
  const url = await start(t);
  for (let i = 0; i < 3; i++) await (await fetch(url + "/service-name")).text();
  await (await fetch(url + "/nowhere")).text();
  const text = await (await fetch(url + "/metrics")).text();
  assert.match(text, /http_requests_total\{method="GET",path="\/service-name",status="200"\} 3/);
  assert.match(text, /http_requests_total\{method="GET",path="",status="404"\} 1/);
  assert.match(text, /http_request_duration_seconds_count\{method="GET",path="\/service-name"\} 3/);
  assert.doesNotMatch(text, /path="\/health"/);
});

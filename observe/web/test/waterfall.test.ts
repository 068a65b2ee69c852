import assert from "node:assert/strict";
import { test } from "node:test";
import { compareTraces, shortName, type Span, ticks, waterfall } from "../src/waterfall";

const span = (id: string, parent: string, start: number, duration: number, more: Partial<Span> = {}): Span => ({ id, parent, service: more.service ?? "s" + id, name: "op", proxy: false, start, duration, ...more });

test("parents come before their children, in the order of time", () => {
  const w = waterfall([span("c", "a", 30_000, 10_000), span("b", "a", 10_000, 15_000), span("a", "", 0, 50_000), span("d", "b", 12_000, 1_000)]);
  assert.deepEqual(w.rows.map((r) => [r.span.id, r.depth]), [["a", 0], ["b", 1], ["d", 2], ["c", 1]]);
  assert.equal(w.duration, 50_000);
  assert.equal(w.rows[1]!.left, 0.2);
  assert.equal(w.rows[1]!.width, 0.3);
  assert.equal(w.moved, 0);
});

test("a child that begins before its parent is moved into it, with its own children", () => {
  const w = waterfall([span("a", "", 100_000, 50_000), span("b", "a", 40_000, 20_000), span("c", "b", 45_000, 5_000)]);
  assert.deepEqual(w.rows.map((r) => r.left), [0, 0, 0.1]);
  assert.deepEqual(w.rows.map((r) => r.moved), [false, true, false]);
  assert.equal(w.moved, 1);
  // A little is no difference of clocks.
  assert.equal(waterfall([span("a", "", 1000, 50_000), span("b", "a", 500, 20_000)]).moved, 0);
});

test("what has no parent, or is its own, is not lost", () => {
  const w = waterfall([span("a", "missing", 0, 10), span("b", "b", 0, 10), span("c", "d", 0, 10), span("d", "c", 0, 10), span("a", "", 5, 5)]);
  assert.deepEqual(w.rows.map((r) => r.span.id).sort(), ["a", "b", "c", "d"]);
  assert.ok(w.rows.find((r) => r.span.id === "a")!.orphan);
  assert.deepEqual(waterfall([]).rows, []);
});

test("the critical path goes back from the end", () => {
  const w = waterfall([span("a", "", 0, 100_000), span("b", "a", 0, 40_000), span("c", "a", 5_000, 20_000), span("d", "a", 45_000, 50_000)]);
  assert.deepEqual(w.rows.filter((r) => r.critical).map((r) => r.span.id), ["a", "b", "d"]);
});

test("closed rows hide what is below", () => {
  const spans = [span("a", "", 0, 100), span("b", "a", 0, 50), span("c", "b", 0, 20)];
  assert.deepEqual(waterfall(spans, new Set(["b"])).rows.map((r) => r.span.id), ["a", "b"]);
});

test("a long chain does not end the stack", () => {
  const spans = Array.from({ length: 3000 }, (_, i) => span(String(i), i ? String(i - 1) : "", i, 10_000 - i));
  assert.equal(waterfall(spans).rows.length, 3000);
});

test("the ruler has few round steps", () => {
  assert.deepEqual(ticks(37_000), [0, 10_000, 20_000, 30_000]);
  assert.deepEqual(ticks(1), [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1]);
  assert.deepEqual(ticks(0), []);
});

test("two traces are paired by place, service and name", () => {
  const a = [span("1", "", 0, 100, { service: "web" }), span("2", "1", 10, 20, { service: "api" }), span("3", "1", 40, 20, { service: "api" }), span("4", "1", 70, 20, { service: "old" })];
  const b = [span("9", "", 0, 150, { service: "web" }), span("8", "9", 10, 20, { service: "api" }), span("7", "9", 40, 90, { service: "api" }), span("6", "7", 50, 20, { service: "new" })];
  const rows = compareTraces(a, b);
  assert.deepEqual(rows.map((r) => [r.service, r.a?.id, r.b?.id]), [["web", "1", "9"], ["api", "2", "8"], ["api", "3", "7"], ["new", undefined, "6"], ["old", "4", undefined]]);
});

test("names are shown without what is the same for all", () => {
  assert.equal(shortName("api.shop.svc.cluster.local:8080/*"), "api:8080/*");
  assert.equal(shortName("GET /x"), "GET /x");
});

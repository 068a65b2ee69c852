import assert from "node:assert/strict";
import { test } from "node:test";
import type { Resource } from "../src/api";
import { scaleTop } from "../src/points";
import { amounts, sumOf, usedBy } from "../src/usage";

test("a limit and a request name their containers", () => {
  const of = (container: string, resource: string, limit?: number, request?: number): Resource => ({ container, resource, limit, request });
  const all = [of("app", "memory", 64, 32), of("istio-proxy", "memory", 1024), of("other", "memory", 64), of("app", "cpu", 2), of("free", "memory", undefined, 8)];
  assert.deepEqual(amounts(all, "memory", "limit"), [{ value: 64, label: "limit of app, other" }, { value: 1024, label: "limit of istio-proxy" }]);
  assert.deepEqual(amounts(all, "memory", "request"), [{ value: 8, label: "request of free" }, { value: 32, label: "request of app" }]);
  assert.deepEqual(amounts(all, "cpu", "limit"), [{ value: 2, label: "limit of app" }]);
  assert.deepEqual(amounts([], "cpu", "limit"), []);
  assert.deepEqual(sumOf(all, "memory", "limit"), { value: 1152, containers: ["app", "istio-proxy", "other"] });
  assert.deepEqual(sumOf(all, "cpu", "request"), { value: 0, containers: [] });
});

test("the lowest limit is on the scale, one far above it does not flatten the rest", () => {
  const limit = (value: number) => ({ value, label: "" });
  assert.equal(scaleTop(10, []), 11);
  assert.equal(scaleTop(0, []), 1);
  assert.equal(scaleTop(10, [limit(1000)]), 1100);
  assert.equal(scaleTop(10, [limit(1000), limit(100)]), 110.00000000000001);
  assert.equal(scaleTop(10, [limit(100), limit(150)]), 165);
});

test("what containers use is by pod and container, the app before its proxy", () => {
  const line = (pod: string, container: string) => ({ labels: { pod, container }, points: [[0, 1]] as [number, number][] });
  assert.deepEqual(usedBy([line("api-b", "istio-proxy"), line("api-a", "web"), line("api-b", "web")], "api").map((u) => [u.label, u.pod, u.container]), [["a web", 0, 0], ["b web", 1, 0], ["b istio-proxy", 1, 1]]);
  assert.deepEqual(usedBy([line("job", "c")], "api").map((u) => u.label), ["job"]);
});

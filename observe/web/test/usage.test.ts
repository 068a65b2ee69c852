import assert from "node:assert/strict";
import { test } from "node:test";
import { scaleTop } from "../src/points";
import { containerLimits, sentQuery, usageQueries, usedBy } from "../src/usage";

test("a limit names its containers", () => {
  const of = (container: string, resource: string, value: number) => ({ labels: { container, resource }, value });
  const values = [of("app", "memory", 64), of("istio-proxy", "memory", 1024), of("other", "memory", 64), of("app", "cpu", 2)];
  assert.deepEqual(containerLimits(values, "memory"), [{ value: 64, label: "limit of app, other" }, { value: 1024, label: "limit of istio-proxy" }]);
  assert.deepEqual(containerLimits(values, "cpu"), [{ value: 2, label: "limit of app" }]);
  assert.deepEqual(containerLimits([], "cpu"), []);
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

test("names of others stay within their quotes", () => {
  const q = usageQueries('a"b', ["x.y", 'z"}'], 30);
  assert.equal(q.memory, 'sum by (pod, container) (container_memory_working_set_bytes{namespace="a\\"b", pod=~"x\\\\.y|z\\"\\\\}"})');
  assert.match(q.cpu, /\[120s\]/);
  assert.match(sentQuery("n", 'a"}', 15), /source_workload="a\\"\}"\}\[60s\]\), "class", "\$\{1\}xx"/);
});

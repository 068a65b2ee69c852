import assert from "node:assert/strict";
import { test } from "node:test";
import { podsOf, prepared } from "../src/prepared";

test("prepared queries count what the store's own jobs have read only", () => {
  for (const query of [...prepared.map((p) => p.query), podsOf("node-1", "cpu"), podsOf("node-1", "memory")]) {
    const selectors = query.match(/(istio|container)_\w+(\{|\[|\))/g) ?? [], ours = query.match(/(istio_\w+\{job="istio-proxy"|container_\w+\{job="kubelet")/g) ?? [];
    assert.ok(selectors.length > 0, query);
    assert.equal(ours.length, selectors.length, query);
  }
  assert.equal(podsOf('a"}', "memory"), 'topk(10, sum by (namespace, pod) (container_memory_working_set_bytes{job="kubelet", node="a\\"}"}))');
});

import assert from "node:assert/strict";
import { test } from "node:test";
import type { Mark } from "../src/api";
import { markWidth, placeMarks } from "../src/marks";
import { align, bucketsOf, countsIn, isolated } from "../src/points";

test("what was not measured is a gap, also in the only series", () => {
  assert.deepEqual(align([{ points: [[0, 1], [15_000, 2], [60_000, 3]] }]), [[0, 15, 30, 60], [1, 2, null, 3]]);
  assert.deepEqual(align([{ points: [[0, 1], [15_000, 2]] }, { points: [[15_000, 5], [30_000, 6]] }]), [[0, 15, 30], [1, 2, null], [null, 5, 6]]);
  assert.deepEqual(align([{ points: [] }]), [[], []]);
});

test("a point without neighbors is found", () => {
  assert.deepEqual(isolated([1, null, 2, 3, null, 4]), [0, 5]);
  assert.deepEqual(isolated([1]), [0]);
  assert.deepEqual(isolated([1, 2]), []);
});

test("buckets fill a time, and do not reach beyond it", () => {
  for (const length of [10, 60, 197, 300, 900, 3600, 86_400, 604_800]) {
    const { step, count } = bucketsOf(5000, 5000 + length * 1000);
    assert.ok(count >= 1 && count <= 90, `${length} s in ${count}`);
    assert.ok(step * count <= length * 1000 && step * count > length * 1000 - count, `${length} s in ${count} of ${step} ms`);
    assert.ok(Number.isInteger(step) && (step >= 15_000 || count === 1));
  }
});

test("counts without lines are zero, and each stands in the middle of its bucket", () => {
  const buckets = bucketsOf(1000, 61_000);
  assert.deepEqual(buckets, { step: 15_000, count: 4 });
  // Loki's points are at the ends. The first one here is that of the time before.
  assert.deepEqual(countsIn([[1000, 9], [31_000, 3]], 1000, buckets), [[8500, 0], [23_500, 3], [38_500, 0], [53_500, 0]]);
});

test("marks stand at their times, and none covers another", () => {
  const mark = (kind: Mark["kind"], time: number): Mark => ({ kind, time, text: `${kind} ${time}` });
  const placed = placeMarks([mark("deploy", 0), mark("restart", 5), mark("oom", 8), mark("deploy", 20), mark("rollout", 50)], (t) => t);
  assert.deepEqual(placed.map((p) => [p.mark.kind, p.at, p.all.map((m) => m.time)]), [["oom", 8, [0, 5, 8, 20]], ["rollout", 50, [50]]]);
  const many = placeMarks(Array.from({ length: 200 }, (_, i) => mark((["oom", "deploy", "restart"] as const)[i % 3]!, i * 3)), (t) => t);
  many.forEach((p, i) => assert.ok(p.at === p.mark.time && (i === 0 || p.at - many[i - 1]!.at >= markWidth)));
  assert.equal(many.reduce((n, p) => n + p.all.length, 0), 200);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { codeParts, sentence } from "../src/format";
import { numbered, revisionTimes } from "../src/since";

const at = (time: number) => new Date(time).toISOString();
const hour = 3_600_000;
const revision = (time: number, name?: string) => ({ time, images: ["a"], ...(name ? { revision: name } : {}) });

test("a revision that was there before the shown time does not begin with it", () => {
  const state = { created: at(hour) };
  // Of a Deployment that is older than the shown time the first revision is as old as it, a later one has pods that are older than the first snapshot.
  assert.deepEqual(revisionTimes({ start: 10 * hour, state, pods: [], revisions: [revision(10 * hour, "1")] }), [{ time: hour, before: false }]);
  assert.deepEqual(revisionTimes({ start: 10 * hour, state, pods: [{ created: at(9 * hour), revision: "4" }, { created: at(8 * hour), revision: "3" }], revisions: [revision(10 * hour, "4")] }), [{ time: 9 * hour, before: true }]);
  assert.deepEqual(revisionTimes({ start: 10 * hour, state, pods: [], revisions: [revision(11 * hour, "5"), revision(10 * hour, "4")] }), [{ time: 11 * hour, before: false }, { time: 10 * hour, before: true }]);
});

test("the only template of a workload that was made within the shown time is as old as it", () => {
  assert.deepEqual(revisionTimes({ start: 0, state: { created: at(hour) }, pods: [], revisions: [revision(2 * hour)] }), [{ time: hour, before: false }]);
  assert.deepEqual(revisionTimes({ start: 0, cut: true, state: { created: at(hour) }, pods: [], revisions: [revision(2 * hour)] }), [{ time: 2 * hour, before: true }]);
  assert.deepEqual(revisionTimes({ start: 0, state: {}, pods: [], revisions: [revision(2 * hour)] }), [{ time: 2 * hour, before: true }]);
});

test("a sentence ends with one full stop, and what is between backticks is code", () => {
  assert.deepEqual(["no such file.", "no such file", "why?", " "].map(sentence), ["no such file.", "no such file.", "why?", ""]);
  assert.deepEqual(codeParts("its log: `kubectl logs a` or `b`"), [{ text: "its log: ", code: false }, { text: "kubectl logs a", code: true }, { text: " or ", code: false }, { text: "b", code: true }]);
  assert.deepEqual(codeParts("a ` alone"), [{ text: "a ` alone", code: false }]);
  assert.deepEqual(codeParts("`".repeat(5)), [{ text: "`".repeat(5), code: false }]);
});

test("a template without a number yet is not a revision of its own", () => {
  const of = (name: string, ...images: string[]) => ({ time: 0, images, ...(name ? { revision: name } : {}) });
  assert.deepEqual(numbered([of("2", "b"), of("1", "a"), of("", "a")]), [of("2", "b"), of("1", "a")]);
  assert.deepEqual(numbered([of("2", "b"), of("", "a"), of("", "b")]), [of("2", "b"), of("", "a"), of("", "b")]);
});

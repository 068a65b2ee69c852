import assert from "node:assert/strict";
import { test } from "node:test";
import { repeatedEvents } from "../src/events";
import { bytes, csv, digits, durationMs, ms, percent, rate, span } from "../src/format";
import { areas } from "../src/shapes";

test("numbers are short", () => {
  assert.deepEqual([0, 0.001, 0.05, 0.5, 5.25, 12, 1234, 12_345].map(rate), ["0/s", "<0.1/min", "3/min", "0.5/s", "5.25/s", "12/s", "1234/s", "12.3k/s"]);
  assert.deepEqual([0, 0.00005, 0.004, 0.0345, 0.5, 1].map(percent), ["0 %", "<0.1 %", "0.4 %", "3.5 %", "50 %", "100 %"]);
  assert.deepEqual([0.25, 1.5, 24, 999.6, 1500, 90_000].map(ms), ["250 µs", "1.5 ms", "24 ms", "1000 ms", "1.5 s", "1 min 30 s"]);
  assert.deepEqual([0, 512, 1024, 1.5 * 2 ** 20, 3 * 2 ** 30].map(bytes), ["0 B", "512 B", "1 KiB", "1.5 MiB", "3 GiB"]);
  assert.deepEqual([5000, 65_000, 3_600_000, 100 * 3_600_000].map(span), ["5 s", "1 min 5 s", "1 h", "4 d 4 h"]);
  assert.equal(digits(0.000001), "0.000001");
});

test("CSV has quotes where needed, and nothing that a spreadsheet calculates", () => {
  assert.equal(csv([["a", 1], ['say "x", y', -2], ["=HYPERLINK(1)", 0], ["+1", 0], ["a\nb", 0]]), 'a,1\r\n"say ""x"", y",-2\r\n\'=HYPERLINK(1),0\r\n\'+1,0\r\n"a\nb",0\r\n');
});

test("events that say the same are one", () => {
  const e = (time: number, text: string) => ({ time, namespace: "a", kind: "Pod", name: "p", reason: "BackOff", text });
  assert.deepEqual(repeatedEvents([e(3, "x"), e(2, "y"), e(1, "x")]).map((r) => [r.event.text, r.times, r.first]), [["x", 2, 1], ["y", 1, 2]]);
});

test("Go's durations", () => {
  assert.deepEqual(["500ms", "1m30s", "2h", "1.5s", "x"].map(durationMs), [500, 90_000, 7_200_000, 1500, 0]);
});

test("a gap in a line is a gap in its area", () => {
  const path = areas([[0, 1], [10, 2], [100, 1], [110, 1]], 20, String, String, 9);
  assert.equal(path, "M0 9L0 1L10 2L10 9ZM100 9L100 1L110 1L110 9Z");
});

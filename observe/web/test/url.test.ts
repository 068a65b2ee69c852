import assert from "node:assert/strict";
import { test } from "node:test";
import { change, endOf, filtersOf, formatDuration, formatPlace, ownPath, parseDuration, parsePlace, placeOf, timeParam, timeQuery, windowOf } from "../src/url";

test("a place survives its URL, whatever the names are", () => {
  for (const path of [[], ["graph"], ["edge", "a/b", "c d", "-", "é%2F\"<&?#"], ["workloads", "..", "%"], ["request", "a+b=="]]) {
    const url = formatPlace(path, new URLSearchParams({ q: '{a="b"} |= `x&y=z`' }));
    const place = parsePlace(url);
    // Dots would be a folder: names that are only dots do not exist in a cluster.
    if (!path.includes("..")) assert.deepEqual(place.path, path);
    assert.equal(place.query.get("q"), '{a="b"} |= `x&y=z`');
  }
  assert.deepEqual(parsePlace("/a/%E0%A4%A").path, ["a", "%E0%A4%A"]);
});

test("time and namespaces go along to another view", () => {
  const from = parsePlace("/graph?t=2026-03-02T13:50:00Z&w=1h&ns=a&ns=b&sel=x&errors=1");
  assert.equal(placeOf(from, ["logs"], { q: "{}" }), "/logs?t=2026-03-02T13%3A50%3A00Z&w=1h&ns=a&ns=b&q=%7B%7D");
  assert.equal(change(from.query, { ns: undefined, w: "", sel: ["1", "2"] }).toString(), "t=2026-03-02T13%3A50%3A00Z&errors=1&sel=1&sel=2");
});

test("the filters of a view are its own parameters", () => {
  const from = parsePlace("/logs?t=2026-03-02T13:50:00Z&w=1h&ns=a&q=%7B%7D&tail=1&sel=x&open=a&open=b");
  assert.deepEqual(filtersOf(from.query), { q: ["{}"], open: ["a", "b"] });
  // With the time and the namespaces of where one is.
  assert.equal(placeOf(parsePlace("/graph?ns=b&errors=1"), ["logs"], filtersOf(from.query)), "/logs?ns=b&q=%7B%7D&open=a&open=b");
});

test("only paths of the page are followed", () => {
  assert.deepEqual(ownPath("/workloads/a/b?x=1")?.path, ["workloads", "a", "b"]);
  for (const link of ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "", "graph"]) assert.equal(ownPath(link), undefined, link);
});

test("durations", () => {
  assert.equal(parseDuration("1h30m"), 5_400_000);
  assert.equal(parseDuration("15m"), 900_000);
  for (const text of ["", "5", "m", "-5m", "5 m", "1y", "5m;"]) assert.equal(parseDuration(text), undefined, text);
  assert.equal(formatDuration(5_400_000), "1h30m");
  assert.equal(parseDuration(formatDuration(90_061_000)), 90_061_000);
});

test("the shown time", () => {
  const q = (text: string) => new URLSearchParams(text);
  assert.equal(endOf(q("")), undefined);
  assert.equal(endOf(q("t=2026-03-02T13:50:00Z")), Date.UTC(2026, 2, 2, 13, 50));
  assert.equal(endOf(q("t=1772459400000")), 1772459400000);
  assert.equal(endOf(q("t=yesterday")), undefined);
  assert.equal(windowOf(q("w=forever")).text, "15m");
  assert.equal(windowOf(q("w=99w")).text, "15m");
  assert.equal(timeParam(1772459400400), "2026-03-02T13:50:00Z");
  assert.equal(timeQuery(q("t=2026-03-02T13:50:00Z&w=1h")).toString(), "window=1h&end=1772459400000");
});

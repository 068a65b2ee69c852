import assert from "node:assert/strict";
import { test } from "node:test";
import { completionAt, suggest } from "../src/complete";
import { hue } from "../src/hue";
import { beforeEnd, groupLines, isMetricQuery, linesOf, type LogLine, parseLine, queryOf, quote, streamSelector, writer } from "../src/logs";

test("lines of streams are in the order of time, to the nanosecond", () => {
  const lines = linesOf([
    { stream: { pod: "a" }, values: [["1772460000000000002", "second"], ["1772460000000000010", "fourth"]] },
    { stream: { pod: "b" }, values: [["1772460000000000001", "first"], ["1772460000000000003", "third"]] },
  ], false);
  assert.deepEqual(lines.map((l) => l.line), ["first", "second", "third", "fourth"]);
  assert.equal(lines[0]!.at, 1772460000000);
});

test("a JSON line is its message and fields", () => {
  const p = parseLine('{"time":"2026-03-02T14:00:00Z","level":"WARN","msg":"slow","request_id":"30450c11-359b-9e2d-9844-a7a456c25a09","trace_id":"c432988e461bb6035f0ccdb05c4a5533","n":{"a":1},"empty":""}');
  assert.equal(p.level, "warn");
  assert.equal(p.message, "slow");
  assert.equal(p.requestId, "30450c11-359b-9e2d-9844-a7a456c25a09");
  assert.equal(p.traceId, "c432988e461bb6035f0ccdb05c4a5533");
  assert.deepEqual(p.fields.map((f) => f[0]), ["request_id", "trace_id", "n"]);
  assert.equal(parseLine('{"trace_id":"00000000000000000000000000000000"}').traceId, undefined);
});

test("an access log line has method, path and code", () => {
  const line = '[2026-03-02T13:59:58.995Z] "GET /a b?c=d HTTP/1.1" 503 UF,URX upstream_reset - "-" 0 501 43 - "-" "curl/8" "30450c11-359b-9e2d-9844-a7a456c25a09" "api:8080" "10.42.0.25:8080" outbound|8080||api.shop.svc.cluster.local 10.42.0.28:43106 10.43.7.1:8080 10.42.0.28:43099 - default';
  const p = parseLine(line);
  assert.deepEqual(p.access, { method: "GET", path: "/a b?c=d", code: 503, flags: "UF,URX", duration: "43" });
  assert.equal(p.level, "error");
  assert.equal(p.requestId, "30450c11-359b-9e2d-9844-a7a456c25a09");
  assert.equal(parseLine("[not one]").access, undefined);
});

test("other lines have their level, if they say one", () => {
  assert.equal(parseLine("2026-03-02T14:00:00Z  WARN 1 --- [x] y").level, "warn");
  assert.equal(parseLine("E0302 14:00:00 x.go:1] bad").level, "error");
  assert.equal(parseLine('level=error msg="it \\"broke\\"" n=1').level, "error");
  assert.equal(parseLine('level=error msg="it \\"broke\\"" n=1').message, 'it "broke"');
  assert.equal(parseLine("nothing").level, "");
  assert.equal(parseLine("{broken").message, "{broken");
  assert.equal(parseLine("[1,2]").message, "[1,2]");
});

test("a line of any length and content is read in a moment", () => {
  for (const line of ["x".repeat(200_000), '{"a":"' + "b".repeat(90_000), "[".repeat(100_000), '"'.repeat(100_000), "a=".repeat(50_000) + " level=", '[2026-03-02T13:59:58.995Z] "' + " ".repeat(60_000), "level=" + 'x="'.repeat(30_000)]) {
    const before = performance.now();
    parseLine(line);
    assert.ok(performance.now() - before < 2000);
  }
});

test("lines that differ only by numbers are one group, also with others between them", () => {
  const line = (text: string, pod = "a", at = 1): LogLine => ({ time: String(at), at, labels: { pod }, line: text });
  const groups = groupLines([line("took 12 ms", "a", 9), line("other"), line("took 7.5 ms", "a", 8), line("took 3 ms", "b"), line("took 1 ms", "a", 7)]);
  assert.deepEqual(groups.map((g) => [g.first.line, g.count]), [["took 12 ms", 3], ["other", 1], ["took 3 ms", 1]]);
  assert.deepEqual([groups[0]!.first.at, groups[0]!.last.at], [9, 7]);
});

test("the color of a name is its own, and names of an app differ", () => {
  const names = ["fastapi-service", "go-service", "java-service", "node-service", "rust-service", "istio-ingressgateway", "istiod", "postgres"];
  const hues = names.map(hue);
  assert.deepEqual([...names].reverse().map(hue).reverse(), hues);
  assert.ok(hues.every((h) => Number.isInteger(h) && h >= 1 && h <= 8));
  assert.ok(new Set(hues).size >= 5, hues.join());
});

test("a writer is the workload and the end of the pod's name", () => {
  assert.deepEqual(writer({ workload: "api", pod: "api-7c9f6d5b8-x2k4p" }), { workload: "api", pod: "x2k4p" });
  assert.deepEqual(writer({ workload: "db", pod: "db-0" }), { workload: "db", pod: "0" });
  assert.deepEqual(writer({ job: "kernel" }), { workload: "kernel", pod: "" });
});

test("names of others stay within their quotes", () => {
  assert.equal(queryOf({ namespaces: ['a"} or {x="'], text: 'say "hi"\n' }), '{job="pods", namespace="a\\"} or {x=\\""} |= "say \\"hi\\"\\n"');
  assert.equal(queryOf({ namespaces: ["a.b", "c"] }), '{job="pods", namespace=~"a\\\\.b|c"}');
  assert.equal(quote('"'), '"\\""');
});

test("what a container wrote before it ended reaches to its end", () => {
  assert.deepEqual(beforeEnd("shop", "api-1", 'a"', Date.UTC(2026, 2, 2, 13, 42)), { q: '{job="pods", namespace="shop", pod="api-1", container="a\\""}', t: "2026-03-02T13:42:01Z", w: "5m" });
});

test("the selector of a query ends where it does", () => {
  assert.equal(streamSelector('{a="}", b=`}`} |= "x"'), '{a="}", b=`}`}');
  assert.ok(isMetricQuery('sum(rate({a="b"}[5m]))'));
  assert.ok(!isMetricQuery('  {a="b"} | json'));
});

test("completion knows what is being written", () => {
  const at = (text: string, language: "logql" | "promql" = "logql") => completionAt(text, text.length, language);
  assert.deepEqual(at("{na"), { from: 1, word: "na", kind: "label" });
  assert.deepEqual(at('{a="b", na'), { from: 8, word: "na", kind: "label" });
  assert.deepEqual(at('{namespace="sh'), { from: 12, word: "sh", kind: "value", label: "namespace" });
  assert.deepEqual(at('{namespace=~"sh'), { from: 13, word: "sh", kind: "value", label: "namespace" });
  assert.deepEqual(at('{a="b"} | js'), { from: 10, word: "js", kind: "pipe" });
  assert.equal(at('{a="b"} |= "js').kind, "none");
  assert.deepEqual(at("sum(ra", "promql"), { from: 4, word: "ra", kind: "name" });
  assert.equal(at('up{job="x"} + istio_req', "promql").word, "istio_req");
  assert.deepEqual(suggest(["rate", "irate", "deriv"], "ra"), ["rate", "irate"]);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { edgeLabel, edgePath, edgePattern, edgeSentence, fit, type Graph, graphRows, healthOf, layout, move, nodeKey, nodeSentence, tabOrder } from "../src/graph";

const node = (namespace: string, name: string, more: object = {}) => ({ kind: "workload" as const, namespace, name, in: 0, inErrors: 0, out: 0, outErrors: 0, ...more });
const edge = (source: number, target: number, more: object = {}) => ({ source, target, protocols: ["http"], requests: 100, rate: 12, errors: 0, rejected: 0, p50: 4, p95: 8, p99: 9, security: "mtls" as const, reporter: "source", ...more });

const graph: Graph = {
  start: 0, end: 900_000, shortened: false, workloads: 4, calls: 4, namespaces: [],
  nodes: [
    node("istio-system", "istio-ingressgateway"),
    node("shop", "web", { in: 12, inErrors: 0 }),
    node("shop", "api", { in: 12, inErrors: 1.2, problem: "1 of 2 pods are ready" }),
    node("data", "db"),
    { kind: "unknown" as const, name: "", in: 0, inErrors: 0, out: 0, outErrors: 0 },
  ],
  edges: [
    edge(0, 1),
    edge(1, 2, { errors: 1.2, weight: 75 }),
    edge(2, 3, { rate: 0, requests: 0, protocols: ["tcp"], p50: undefined, p95: undefined, p99: undefined, tcp: { sent: 2048, received: 1024, connections: 0.1 } }),
    edge(4, 2, { security: "plain" }),
  ],
};

test("an edge is a whole sentence", () => {
  assert.equal(edgeSentence(graph, graph.edges[0]!), "istio-ingressgateway calls web, 12 requests per second, no errors, p99 9 ms, mutual TLS");
  assert.equal(edgeSentence(graph, graph.edges[1]!), "web calls api, 12 requests per second, 10 % errors, p99 9 ms, 75 % of a rollout, mutual TLS");
  assert.equal(edgeSentence(graph, graph.edges[2]!), "api calls db, TCP, 2 KiB per second sent, 1 KiB per second received, mutual TLS");
  assert.equal(edgeSentence(graph, graph.edges[3]!), "a caller without a sidecar calls api, 12 requests per second, no errors, p99 9 ms, without encryption");
});

test("a node is a whole sentence", () => {
  assert.equal(nodeSentence(graph, 2), "api, namespace shop, receives 12 requests per second, 10 % errors, called by 2, calls 1, 1 of 2 pods are ready");
  const gateway = { ...graph, nodes: [node("istio-system", "istio-ingressgateway", { in: 3, noRoute: 3 })], edges: [] };
  assert.equal(nodeSentence(gateway, 0), "istio-ingressgateway, namespace istio-system, receives 3 requests per second, no errors, 3 requests per second have no route, called by 0, calls 0");
});

test("edges differ without color", () => {
  assert.deepEqual(graph.edges.map(edgePattern), ["solid", "dashed", "dotted", "solid"]);
  assert.deepEqual(edgeLabel(graph.edges[1]!), ["12/s · 8 ms", "10 % errors", "rollout 75 %"]);
  assert.deepEqual(edgeLabel(graph.edges[2]!), ["3 KiB/s"]);
  assert.equal(healthOf(100, 0.9), "ok");
  assert.equal(healthOf(100, 1), "warn");
  assert.equal(healthOf(100, 5), "bad");
  assert.equal(healthOf(0, 0), "idle");
});

for (const direction of ["LR", "TB"] as const) {
  test(`nothing of the drawing overlaps or lies outside, ${direction}`, () => {
    const l = layout(graph, direction);
    const boxes = [...l.nodes, ...l.edges.map((e) => e.label)].map((b) => ({ left: b.x - b.width / 2, right: b.x + b.width / 2, top: b.y - b.height / 2, bottom: b.y + b.height / 2 }));
    for (const [i, a] of boxes.entries()) {
      assert.ok(a.left >= 0 && a.top >= 0 && a.right <= l.width && a.bottom <= l.height);
      for (const b of boxes.slice(i + 1)) assert.ok(a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top);
    }
    const along = direction === "LR" ? 0 : 1, across = 1 - along;
    for (const e of l.edges) {
      assert.match(e.path, /^M[\d.]+ [\d.]+(C[-\d. ]+)+$/);
      // A line touches the sides of its nodes that face the label, and both sides of the label.
      const points = e.path.slice(1).split("C").map((c) => c.trim().split(" ").slice(-2).map(Number) as [number, number]);
      const { source, target } = graph.edges[e.index]!;
      const face = (b: { x: number; y: number; width: number; height: number }, sign: number) => (direction === "LR" ? b.x + (sign * b.width) / 2 : b.y + (sign * b.height) / 2);
      const middle = direction === "LR" ? e.label.y : e.label.x;
      const near = (a: number, b: number) => assert.ok(Math.abs(a - b) < 0.11, `${a} is not ${b}: ${e.path}`);
      near(points[0]![along]!, face(l.nodes[source]!, 1));
      near(points.at(-1)![along]!, face(l.nodes[target]!, -1));
      const left = points.findIndex((q) => Math.abs(q[along]! - face(e.label, -1)) < 0.11);
      assert.ok(left > 0);
      near(points[left]![across]!, middle);
      near(points[left + 1]![along]!, face(e.label, 1));
      near(points[left + 1]![across]!, middle);
      // Between nodes and labels there is room for an arrow.
      assert.ok(face(l.nodes[target]!, -1) - face(e.label, 1) >= 14);
    }
  });
}

test("arrow keys follow the calls", () => {
  const l = layout(graph, "LR");
  assert.deepEqual(move(graph, l, { node: 0 }, "ArrowRight"), { edge: 0 });
  assert.deepEqual(move(graph, l, { edge: 0 }, "ArrowRight"), { node: 1 });
  assert.deepEqual(move(graph, l, { node: 1 }, "ArrowLeft"), { edge: 0 });
  assert.deepEqual(move(graph, l, { edge: 0 }, "ArrowLeft"), { node: 0 });
  assert.equal(move(graph, l, { node: 0 }, "ArrowLeft"), undefined);
  assert.equal(move(graph, l, { node: 3 }, "ArrowRight"), undefined);
  assert.equal(move(graph, l, { node: 0 }, "x"), undefined);
});

test("Tab goes along the calls, to each node once", () => {
  const order = tabOrder(layout(graph, "LR"), "LR");
  assert.deepEqual([...order].sort(), [0, 1, 2, 3, 4]);
  assert.ok(order.indexOf(0) < order.indexOf(1) && order.indexOf(1) < order.indexOf(2) && order.indexOf(2) < order.indexOf(3));
});

test("names of others stay apart", () => {
  assert.notEqual(nodeKey(node("a/b", "c")), nodeKey(node("a", "b/c")));
  assert.deepEqual(edgePath(graph, graph.edges[3]!), { path: ["edge", "-", "-", "shop", "api"] });
  const service = { ...graph, nodes: [graph.nodes[0]!, { ...node("shop", "x"), kind: "service" as const }] };
  assert.deepEqual(edgePath(service, edge(0, 1)), { path: ["edge", "istio-system", "istio-ingressgateway", "shop", "x"], kind: "service" });
  assert.equal(edgePath({ ...graph, nodes: [graph.nodes[0]!, { ...node("shop", "shop"), kind: "namespace" as const }] }, edge(0, 1)), undefined);
  assert.equal(fit("a-very-long-name-of-a-workload-v2", 12), "a-very-…d-v2");
});

test("the table has a row for each edge", () => {
  const rows = graphRows(graph);
  assert.equal(rows.length, 5);
  assert.deepEqual(rows[2]!.slice(0, 7), ["shop", "web", "shop", "api", "http", 12, 1.2]);
});

test("two workloads that call each other, and one that calls itself", () => {
  const g = { ...graph, nodes: graph.nodes.slice(0, 2), edges: [edge(0, 1), edge(1, 0), edge(1, 1)] };
  const l = layout(g, "LR");
  assert.equal(l.edges.length, 3);
  for (const e of l.edges) assert.match(e.path, /^M[\d.]+ [\d.]+([CQL][-\d. ]+)+$/);
});

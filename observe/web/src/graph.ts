// The service graph: from the API's answer to a drawing, and to sentences. This file has no effects.
import dagre from "@dagrejs/dagre";
import { curve, flow, type Point } from "./shapes";
import { bytes, count, ms, percent, rate } from "./format";

export type NodeKind = "workload" | "service" | "external" | "unknown" | "namespace" | "rest";

export interface GraphNode {
  kind: NodeKind;
  namespace?: string;
  name: string;
  members?: number;
  services?: string[];
  in: number;
  inErrors: number;
  /** The part of in that the proxy answered itself, because it had no route. */
  noRoute?: number;
  out: number;
  outErrors: number;
  problem?: string;
}

export interface GraphEdge {
  source: number;
  target: number;
  protocols: string[];
  requests: number;
  rate: number;
  errors: number;
  rejected: number;
  p50?: number;
  p95?: number;
  p99?: number;
  tcp?: { sent: number; received: number; connections: number };
  security: "mtls" | "plain" | "mixed" | "unknown";
  reporter: string;
  weight?: number;
}

export interface NamespaceCount {
  name: string;
  workloads: number;
  rate: number;
  errors: number;
  box: boolean;
}

export interface Graph {
  start: number;
  end: number;
  shortened: boolean;
  nodes: GraphNode[];
  edges: GraphEdge[];
  namespaces: NamespaceCount[];
  workloads: number;
  calls: number;
  untimed?: boolean;
}

/** Above this share of failed requests an edge counts as failing, and above the second one as broken. */
export const failingShare = 0.01, brokenShare = 0.05;

export type Health = "ok" | "warn" | "bad" | "idle";

export function healthOf(requests: number, errors: number): Health {
  if (requests <= 0) return "idle";
  const share = errors / requests;
  return share >= brokenShare ? "bad" : share >= failingShare ? "warn" : "ok";
}

export const edgeHealth = (e: GraphEdge): Health => (e.rate > 0 ? healthOf(e.rate, e.errors) : e.tcp ? "ok" : "idle");

export function nodeHealth(n: GraphNode): Health {
  const health = healthOf(n.in, n.inErrors);
  return n.problem && health !== "bad" ? "warn" : health;
}

/** A key for a node that survives a new answer, in which its index may be another one. */
export const nodeKey = (n: GraphNode): string => JSON.stringify([n.kind, n.namespace ?? "", n.name]);

/** The name of a node as it is drawn and read. */
export function title(n: GraphNode): string {
  switch (n.kind) {
    case "unknown":
      return "no sidecar";
    case "rest":
      return `${n.members ?? 0} more`;
    default:
      return n.name;
  }
}

/** The second line of a node. */
export function subtitle(n: GraphNode): string {
  switch (n.kind) {
    case "unknown":
      return "unknown callers";
    case "rest":
      return n.namespace ? `workloads of ${n.namespace}` : "workloads and namespaces";
    case "namespace":
      return count(n.members ?? 0, "workload", "workloads");
    case "external":
      return "outside of the cluster";
    case "service":
      return `service, ${n.namespace}`;
    default:
      return n.namespace ?? "";
  }
}

const securityWords = { mtls: "mutual TLS", plain: "without encryption", mixed: "only partly with mutual TLS", unknown: "encryption unknown" };
export const securityText = (e: GraphEdge): string => securityWords[e.security];

/** An edge in a sentence, as a screen reader says it. */
export function edgeSentence(g: Graph, e: GraphEdge): string {
  const parts = [`${spoken(g.nodes[e.source]!)} calls ${spoken(g.nodes[e.target]!)}`];
  if (e.rate > 0) {
    parts.push(`${spokenRate(e.rate)}`, e.errors > 0 ? `${percent(e.errors / e.rate)} errors` : "no errors");
    if (e.p99 !== undefined) parts.push(`p99 ${ms(e.p99)}`);
  }
  if (e.tcp) parts.push(`TCP, ${bytes(e.tcp.sent)} per second sent, ${bytes(e.tcp.received)} per second received`);
  if (e.rate === 0 && !e.tcp) parts.push("no requests");
  if (e.weight !== undefined) parts.push(`${e.weight} % of a rollout`);
  parts.push(securityText(e));
  return parts.join(", ");
}

function spoken(n: GraphNode): string {
  switch (n.kind) {
    case "unknown":
      return "a caller without a sidecar";
    case "namespace":
      return `namespace ${n.name}`;
    case "rest":
      return `${n.members ?? 0} more workloads`;
    case "service":
      return `service ${n.name}`;
    default:
      return n.name;
  }
}

const spokenRate = (perSecond: number): string => rate(perSecond).replace("/s", " requests per second").replace("/min", " requests per minute");

/** A node in a sentence. */
export function nodeSentence(g: Graph, index: number): string {
  const n = g.nodes[index]!;
  const calls = g.edges.filter((e) => e.source === index).length, called = g.edges.filter((e) => e.target === index).length;
  const parts = [spoken(n)];
  if (n.namespace && n.kind !== "namespace" && n.kind !== "rest") parts.push(`namespace ${n.namespace}`);
  if (n.kind === "namespace") parts.push(count(n.members ?? 0, "workload", "workloads"));
  if (n.in > 0) parts.push(`receives ${spokenRate(n.in)}`, n.inErrors > 0 ? `${percent(n.inErrors / n.in)} errors` : "no errors");
  if (n.noRoute) parts.push(`${spokenRate(n.noRoute)} have no route`);
  parts.push(`called by ${called}, calls ${calls}`);
  if (n.problem) parts.push(n.problem);
  return parts.join(", ");
}

/** The third line of a node. */
export function nodeNumbers(n: GraphNode): string {
  return n.in > 0 ? rate(n.in) + (n.inErrors > 0 ? ` · ${percent(n.inErrors / n.in)} errors` : "") : "";
}

/** The label of an edge in the drawing, in two lines. */
export function edgeLabel(e: GraphEdge): string[] {
  const lines: string[] = [];
  if (e.rate > 0) {
    lines.push(e.p95 !== undefined ? `${rate(e.rate)} · ${ms(e.p95)}` : rate(e.rate));
    if (e.errors > 0) lines.push(`${percent(e.errors / e.rate)} errors`);
  } else if (e.tcp) {
    lines.push(`${bytes(e.tcp.sent + e.tcp.received)}/s`);
  } else {
    lines.push("idle");
  }
  if (e.weight !== undefined) lines.push(`rollout ${e.weight} %`);
  return lines;
}

/** The kind of line by which edges differ without color. */
export function edgePattern(e: GraphEdge): "solid" | "dotted" | "dashed" {
  const health = edgeHealth(e);
  if (health === "bad" || health === "warn") return "dashed";
  return e.tcp && e.rate === 0 ? "dotted" : "solid";
}

export interface PlacedNode extends Point {
  index: number;
  width: number;
  height: number;
}

export interface PlacedEdge {
  index: number;
  /** Its line as an SVG path. It ends at both sides of the label, and goes on behind it. */
  path: string;
  label: Point & { width: number; height: number; lines: string[] };
}

export interface Layout {
  width: number;
  height: number;
  nodes: PlacedNode[];
  edges: PlacedEdge[];
}

/** The width of a text in pixels. The page measures with its font; without one, letters are about as wide as these. */
export type Measure = (text: string, size: number, bold: boolean) => number;
const estimate: Measure = (text, size, bold) => text.length * size * (bold ? 0.62 : 0.56);

/** Text that fits into a width, with an ellipsis in the middle: names of one app begin alike. */
export function fit(text: string, letters: number): string {
  if (text.length <= letters) return text;
  const head = Math.ceil((letters - 1) * 0.6);
  return text.slice(0, head) + "…" + text.slice(text.length - (letters - 1 - head));
}

export const nodeLetters = 24;

export function layout(g: Graph, direction: "LR" | "TB", measure: Measure = estimate): Layout {
  const d = new dagre.graphlib.Graph({ multigraph: true });
  d.setGraph({ rankdir: direction, nodesep: direction === "LR" ? 22 : 16, ranksep: direction === "LR" ? 44 : 52, edgesep: 12, marginx: 16, marginy: 16 });
  d.setDefaultEdgeLabel(() => ({}));
  g.nodes.forEach((n, i) => {
    const width = Math.max(measure(fit(title(n), nodeLetters), 12.5, true), measure(fit(subtitle(n), nodeLetters + 2), 11, false), measure(nodeNumbers(n), 11, true), 60);
    d.setNode(String(i), { width: Math.ceil(width) + 46, height: n.in > 0 ? 60 : 46 });
  });
  g.edges.forEach((e, i) => {
    const lines = edgeLabel(e);
    const width = Math.max(...lines.map((l, j) => measure(l, 11, j > 0)));
    // Two nodes that call each other have two edges.
    d.setEdge(String(e.source), String(e.target), { width: Math.ceil(width) + labelRoom, height: lines.length * 14 + 6, labelpos: "c", lines }, String(i));
  });
  dagre.layout(d);
  const size = d.graph();
  return {
    width: Math.ceil(size.width ?? 0),
    height: Math.ceil(size.height ?? 0),
    nodes: g.nodes.map((_, i) => {
      const n = d.node(String(i));
      return { index: i, x: n.x!, y: n.y!, width: n.width, height: n.height };
    }),
    edges: g.edges.map((e, i) => {
      const x = d.edge(String(e.source), String(e.target), String(i)) as unknown as { points: Point[]; x: number; y: number; width: number; height: number; lines: string[] };
      return { index: i, path: e.source === e.target ? curve(x.points) : flow(anchors(x, d.node(String(e.source)), d.node(String(e.target)), direction), direction === "LR" ? "x" : "y"), label: { x: x.x, y: x.y, width: x.width, height: x.height, lines: x.lines } };
    }),
  };
}

/** What a label has beside its text: an icon, and a margin. */
const labelRoom = 25;

/** An arrow has a straight shaft. */
const arrowLength = 9;

interface Box extends Point {
  width: number;
  height: number;
}

/** The points through which the line of an edge goes: from a side of one node, straight through the label, to a side of the other one. */
function anchors(label: Box & { points: Point[] }, source: Box, target: Box, direction: "LR" | "TB"): Point[] {
  const along = direction === "LR" ? "x" : "y", across = direction === "LR" ? "y" : "x";
  const length = direction === "LR" ? "width" : "height", breadth = direction === "LR" ? "height" : "width";
  const sign = target[along] >= source[along] ? 1 : -1;
  const at = (a: number, b: number): Point => (direction === "LR" ? { x: a, y: b } : { x: b, y: a });
  // Several lines at one side of a node are apart, as dagre has them, but near to their labels; none of them begins at a round corner.
  const side = (box: Box, near: Point, towards: number): Point => {
    const most = box[breadth] / 2 - 12;
    const wanted = (near[across] - box[across] + Math.max(-most, Math.min(most, label[across] - box[across]))) / 2;
    return at(box[along] + (towards * box[length]) / 2, box[across] + Math.max(-most, Math.min(most, wanted)));
  };
  const bends = label.points.slice(1, -1).filter((q) => Math.abs(q[along] - label[along]) > label[length] / 2 + 1);
  const through = [label[along] - (sign * label[length]) / 2, label[along] + (sign * label[length]) / 2].map((a) => at(a, label[across]));
  const end = side(target, label.points.at(-1)!, -sign);
  return [
    side(source, label.points[0]!, sign), ...bends.filter((q) => sign * (q[along] - label[along]) < 0), ...through, ...bends.filter((q) => sign * (q[along] - label[along]) > 0),
    at(end[along] - sign * arrowLength, end[across]), end,
  ];
}

/** Where an arrow key leads from a node or an edge. Right and left follow the calls, up and down go to the neighbor on the screen. */
export type Focus = { node: number } | { edge: number };

export function move(g: Graph, l: Layout, from: Focus, key: string): Focus | undefined {
  const vertical = key === "ArrowUp" || key === "ArrowDown";
  if ("edge" in from) {
    const e = g.edges[from.edge]!;
    if (key === "ArrowRight") return { node: e.target };
    if (key === "ArrowLeft") return { node: e.source };
    if (!vertical) return undefined;
    const siblings = g.edges.map((x, i) => ({ x, i })).filter(({ x }) => x.source === e.source).map(({ i }) => i);
    siblings.sort((a, b) => l.edges[a]!.label.y - l.edges[b]!.label.y || a - b);
    const next = siblings[siblings.indexOf(from.edge) + (key === "ArrowDown" ? 1 : -1)];
    return next === undefined ? undefined : { edge: next };
  }
  if (!vertical) {
    const out = key === "ArrowRight";
    if (!out && key !== "ArrowLeft") return undefined;
    const edges = g.edges.map((x, i) => ({ x, i })).filter(({ x }) => (out ? x.source : x.target) === from.node).map(({ i }) => i);
    edges.sort((a, b) => l.edges[a]!.label.y - l.edges[b]!.label.y || a - b);
    return edges[0] === undefined ? undefined : { edge: edges[0] };
  }
  const here = l.nodes[from.node]!;
  const sign = key === "ArrowDown" ? 1 : -1;
  let best: PlacedNode | undefined, distance = Infinity;
  for (const n of l.nodes) {
    const dy = (n.y - here.y) * sign, dx = Math.abs(n.x - here.x);
    if (dy <= 1) continue;
    const far = dy + 2 * dx;
    if (far < distance) {
      best = n;
      distance = far;
    }
  }
  return best && { node: best.index };
}

/** The order in which Tab goes through the nodes: along the calls, then downwards. */
export function tabOrder(l: Layout, direction: "LR" | "TB"): number[] {
  const rank = (n: PlacedNode) => Math.round((direction === "LR" ? n.x : n.y) / 40);
  const across = (n: PlacedNode) => (direction === "LR" ? n.y : n.x);
  return [...l.nodes].sort((a, b) => rank(a) - rank(b) || across(a) - across(b)).map((n) => n.index);
}

/** The path of the view of an edge, undefined if it has none: boxes stand for many. */
export function edgePath(g: Graph, e: GraphEdge): { path: string[]; kind?: string } | undefined {
  const from = g.nodes[e.source]!, to = g.nodes[e.target]!;
  if (!["workload", "unknown"].includes(from.kind) || !["workload", "service", "external"].includes(to.kind)) return undefined;
  return {
    path: ["edge", from.namespace || "-", from.name || "-", to.namespace || "-", to.name],
    ...(to.kind === "workload" ? {} : { kind: to.kind }),
  };
}

/** The rows of the graph as a table, for the screen and for CSV. */
export function graphRows(g: Graph): (string | number)[][] {
  const n = (v: number | undefined) => (v === undefined ? "" : Number(v.toPrecision(4)));
  return [
    ["source namespace", "source", "target namespace", "target", "protocol", "requests/s", "errors/s", "4xx/s", "p50 ms", "p95 ms", "p99 ms", "sent B/s", "received B/s", "security", "measured by"],
    ...g.edges.map((e) => {
      const from = g.nodes[e.source]!, to = g.nodes[e.target]!;
      return [
        from.namespace ?? "", title(from), to.namespace ?? "", title(to), e.protocols.join(" "), n(e.rate), n(e.errors), n(e.rejected), n(e.p50), n(e.p95), n(e.p99),
        n(e.tcp?.sent), n(e.tcp?.received), e.security, e.reporter,
      ] as (string | number)[];
    }),
  ];
}

/** How strong an edge is drawn. */
export const edgeWidth = (e: GraphEdge): number => 1.2 + Math.min(2.6, Math.log10(1 + e.rate + (e.tcp ? (e.tcp.sent + e.tcp.received) / 10_000 : 0)));


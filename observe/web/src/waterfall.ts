// The waterfall: spans as rows of a tree. This file has no effects.

export interface NamedValue {
  name: string;
  value: string;
}

export interface Span {
  id: string;
  parent?: string;
  traceId?: string;
  service: string;
  namespace?: string;
  pod?: string;
  name: string;
  kind?: string;
  proxy: boolean;
  start: number; // microseconds
  duration: number;
  error?: boolean;
  message?: string;
  attributes?: NamedValue[];
  resource?: NamedValue[];
  events?: { time: number; name: string; attributes?: NamedValue[] }[];
  warnings?: string[];
}

export interface Row {
  span: Span;
  depth: number;
  children: number;
  /** As shares of the whole. */
  left: number;
  width: number;
  /** The clock of its node differs: it is drawn within its parent. */
  moved: boolean;
  /** It is part of what made the request take so long. */
  critical: boolean;
  /** Its parent is not among the spans. */
  orphan: boolean;
}

export interface Waterfall {
  rows: Row[];
  start: number;
  duration: number;
  moved: number;
}

/** The rows of spans, parents before children. A child that seems to start before its parent, or after its end, is moved into it: clocks differ. */
export function waterfall(spans: Span[], closed: ReadonlySet<string> = new Set()): Waterfall {
  const byId = new Map<string, Span>();
  for (const s of spans) if (!byId.has(s.id)) byId.set(s.id, s);
  const children = new Map<string, Span[]>();
  const roots: Span[] = [], begin = rootsOf(byId);
  for (const s of byId.values()) {
    if (s.parent && !begin.has(s)) {
      const list = children.get(s.parent);
      if (list) list.push(s);
      else children.set(s.parent, [s]);
    } else {
      roots.push(s);
    }
  }
  const order = (a: Span, b: Span) => a.start - b.start || b.duration - a.duration || (a.id < b.id ? -1 : 1);
  roots.sort(order);
  for (const list of children.values()) list.sort(order);

  // Where each span is drawn, in microseconds.
  const placed = new Map<Span, { start: number; end: number; moved: boolean }>();
  const place = (s: Span, parent: { start: number; end: number } | undefined, shift: number): void => {
    let start = s.start + shift, moved = false;
    if (parent) {
      const slack = 1000; // what clocks and rounding may differ without a word
      const latest = Math.max(parent.start, parent.end - s.duration);
      const within = Math.min(Math.max(start, parent.start), latest);
      moved = Math.abs(within - start) > slack;
      if (moved) shift += within - start;
      start = within;
    }
    const at = { start, end: start + s.duration, moved };
    placed.set(s, at);
    for (const child of children.get(s.id) ?? []) place(child, at, shift);
  };
  for (const r of roots) place(r, undefined, 0);

  let start = Infinity, end = -Infinity;
  for (const at of placed.values()) {
    start = Math.min(start, at.start);
    end = Math.max(end, at.end);
  }
  if (!Number.isFinite(start)) return { rows: [], start: 0, duration: 0, moved: 0 };
  const whole = Math.max(1, end - start);

  const critical = new Set<Span>();
  for (const r of roots.slice(0, 1)) walkCritical(r, children, placed, critical);

  const rows: Row[] = [];
  let moved = 0;
  const add = (s: Span, depth: number, orphan: boolean): void => {
    const at = placed.get(s)!;
    if (at.moved) moved++;
    const below = children.get(s.id) ?? [];
    rows.push({
      span: s, depth, children: below.length, moved: at.moved, critical: critical.has(s), orphan,
      left: (at.start - start) / whole, width: (at.end - at.start) / whole,
    });
    if (!closed.has(s.id)) for (const child of below) add(child, depth + 1, false);
  };
  roots.forEach((r) => add(r, 0, !!r.parent && r.parent !== r.id));
  return { rows, start, duration: whole, moved };
}

/** How deep a tree may be. What is deeper begins at the left again. */
const deepest = 400;

/** The spans that begin a tree: without a parent, their own ancestors, or too deep. Ids come from others. */
function rootsOf(byId: Map<string, Span>): Set<Span> {
  const roots = new Set<Span>(), depth = new Map<Span, number>();
  for (const first of byId.values()) {
    const way: Span[] = [], onWay = new Set<Span>();
    let s: Span | undefined = first;
    while (s && !depth.has(s) && !onWay.has(s)) {
      way.push(s);
      onWay.add(s);
      s = s.parent ? byId.get(s.parent) : undefined;
    }
    let d = s && depth.has(s) ? depth.get(s)! : -1;
    for (const next of way.reverse()) {
      d = (d + 1) % deepest;
      depth.set(next, d);
      if (d === 0) roots.add(next);
    }
  }
  return roots;
}

/** From the end backwards: the child that ended last, then what ended before that one began. */
function walkCritical(s: Span, children: Map<string, Span[]>, placed: Map<Span, { start: number; end: number }>, critical: Set<Span>): void {
  critical.add(s);
  let until = placed.get(s)!.end;
  const below = [...(children.get(s.id) ?? [])].sort((a, b) => placed.get(b)!.end - placed.get(a)!.end);
  for (const child of below) {
    const at = placed.get(child)!;
    if (at.end <= until) {
      walkCritical(child, children, placed, critical);
      until = at.start;
    }
  }
}

/** The name of a span without what is the same for all services of the cluster. */
export const shortName = (name: string): string => name.replace(/\.[\w-]+\.svc\.cluster\.local/, "");

/** Times for the ruler of a waterfall, in microseconds from its start: at most five steps of 1, 2 or 5. */
export function ticks(duration: number, most = 5): number[] {
  if (!(duration > 0)) return [];
  const raw = duration / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((x) => x >= raw)!;
  const list: number[] = [];
  for (let t = 0; t <= duration * 1.0001; t += step) list.push(t);
  return list;
}

/** A place in a trace that is the same in another one of the same kind. */
export interface Compared {
  key: string;
  depth: number;
  service: string;
  name: string;
  a?: Span;
  b?: Span;
}

/** Pairs the spans of two traces by service, name and place in the tree; of several that are alike by their order. */
export function compareTraces(a: Span[], b: Span[]): Compared[] {
  const keyed = (spans: Span[]) => {
    const out = new Map<string, { span: Span; depth: number; order: number }>();
    const keys: string[] = [];
    const stack: string[] = [];
    const used = new Map<string, number>();
    for (const row of waterfall(spans).rows) {
      stack.length = row.depth;
      const base = JSON.stringify([stack[row.depth - 1] ?? "", row.span.service, row.span.name, row.span.kind ?? ""]);
      const n = used.get(base) ?? 0;
      used.set(base, n + 1);
      const key = JSON.stringify([base, n]);
      stack.push(key);
      out.set(key, { span: row.span, depth: row.depth, order: keys.length });
      keys.push(key);
    }
    return { out, keys };
  };
  const left = keyed(a), right = keyed(b);
  // The order of the first one; what only the second one has comes after its predecessor there.
  const order = [...left.keys];
  right.keys.forEach((key, i) => {
    if (left.out.has(key)) return;
    const before = right.keys.slice(0, i).findLast((k) => order.includes(k));
    order.splice(before === undefined ? 0 : order.indexOf(before) + 1, 0, key);
  });
  return order.map((key) => {
    const x = left.out.get(key), y = right.out.get(key), one = (x ?? y)!;
    return { key, depth: one.depth, service: one.span.service, name: one.span.name, a: x?.span, b: y?.span };
  });
}

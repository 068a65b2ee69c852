// Lines of logs: what is in them, and how they are shown. This file has no effects.
import { type Change, timeParam } from "./url";

export interface LogLine {
  /** Unix nanoseconds, as text: a number would lose the last digits. */
  time: string;
  /** Unix milliseconds. */
  at: number;
  labels: Record<string, string>;
  line: string;
}

export interface LokiStream {
  stream: Record<string, string>;
  values: [string, string, ...unknown[]][];
}

/** The lines of Loki's streams in the order of time. */
export function linesOf(streams: LokiStream[], newest: boolean): LogLine[] {
  const lines: LogLine[] = [];
  for (const s of streams) {
    for (const [time, line] of s.values) lines.push({ time, at: Number(time.slice(0, -6)), labels: s.stream, line });
  }
  const sign = newest ? -1 : 1;
  return lines.sort((a, b) => sign * compareTimes(a.time, b.time));
}

export function compareTimes(a: string, b: string): number {
  return a.length - b.length || (a < b ? -1 : a > b ? 1 : 0);
}

export type Level = "error" | "warn" | "info" | "debug" | "";

const levelNames: Record<string, Level> = {
  emerg: "error", emergency: "error", alert: "error", crit: "error", critical: "error", fatal: "error", panic: "error", error: "error", err: "error", severe: "error", e: "error",
  warn: "warn", warning: "warn", w: "warn",
  info: "info", information: "info", notice: "info", i: "info",
  debug: "debug", trace: "debug", verbose: "debug", d: "debug", t: "debug",
};

export function levelOf(text: string): Level {
  return levelNames[text.toLowerCase()] ?? "";
}

export interface Parsed {
  level: Level;
  /** What the line says; of an object its message. */
  message: string;
  /** The other fields of an object, in their order. */
  fields: [string, string][];
  /** The line is an access log's. */
  access?: { method: string; path: string; code: number; flags: string; duration: string };
  requestId?: string;
  traceId?: string;
}

const messageKeys = ["msg", "message", "log", "event"], levelKeys = ["level", "severity", "lvl", "log.level", "@level"];
const requestKeys = ["request_id", "requestId", "x-request-id", "x_request_id"], traceKeys = ["trace_id", "traceId", "traceid", "trace.id", "traceID"];
const timeKeys = ["time", "ts", "timestamp", "@timestamp", "t"];

const accessPattern = /^\[[^\]]{10,40}\] "(\S+) (.*?) (?:HTTP\/[\d.]+|-)" (\d+) (\S+) \S+ .*? (\d+) (?:\d+|-) "/;
const uuid = /\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b/;

/** What a line has in it. It is read as JSON, as Istio's access log, as logfmt, or for words like ERROR at its begin. */
export function parseLine(line: string): Parsed {
  if (line.startsWith("{") && line.length < 100_000) {
    try {
      const object: unknown = JSON.parse(line);
      if (object && typeof object === "object" && !Array.isArray(object)) return fromFields(Object.entries(object).map(([k, v]) => [k, typeof v === "string" ? v : JSON.stringify(v)]));
    } catch {
      // a line that only begins like an object
    }
  }
  const access = accessPattern.exec(line.slice(0, 16_000));
  if (access) {
    const code = Number(access[3]);
    const level = code >= 500 || code === 0 ? "error" : code >= 400 ? "warn" : "info";
    const parsed: Parsed = { level, message: line, fields: [], access: { method: access[1]!, path: access[2]!, code, flags: access[4] === "-" ? "" : access[4]!, duration: access[5]! } };
    const id = uuid.exec(line);
    if (id) parsed.requestId = id[0];
    return parsed;
  }
  if (/(^|\s)(level|lvl|severity)=/.test(line.slice(0, 1000))) return fromFields(logfmt(line.slice(0, 20_000)), line);
  const word = /^.{0,60}?\b(EMERG|FATAL|PANIC|CRITICAL|ERROR|ERR|WARNING|WARN|INFO|NOTICE|DEBUG|TRACE)\b/.exec(line) ?? /^([EWID])\d{4} /.exec(line);
  return { level: word ? levelOf(word[1]!) : "", message: line, fields: [] };
}

function fromFields(all: [string, string][], line?: string): Parsed {
  const take = (keys: string[]) => {
    for (const key of keys) {
      const found = all.find(([k, v]) => k === key && v !== "");
      if (found) return found;
    }
    return undefined;
  };
  const message = take(messageKeys), level = take(levelKeys), request = take(requestKeys), trace = take(traceKeys), time = take(timeKeys);
  const parsed: Parsed = {
    level: level ? levelOf(level[1]) : "",
    message: message?.[1] ?? line ?? "",
    fields: all.filter((f) => f !== message && f !== level && f !== time && f[1] !== ""),
  };
  if (request) parsed.requestId = request[1];
  if (trace && /^[0-9a-f]{16,32}$/.test(trace[1]) && !/^0+$/.test(trace[1])) parsed.traceId = trace[1];
  return parsed;
}

function logfmt(line: string): [string, string][] {
  const out: [string, string][] = [];
  for (const m of line.matchAll(/([A-Za-z_][\w.@-]*)=("(?:[^"\\]|\\.)*"|\S*)/g)) {
    let value = m[2]!;
    if (value.startsWith('"')) {
      try {
        value = JSON.parse(value) as string;
      } catch {
        value = value.slice(1, -1);
      }
    }
    out.push([m[1]!, value]);
  }
  return out;
}

/** Who wrote a line, in short: the pod without what its workload's name already says. */
export function writer(labels: Record<string, string>): { workload: string; pod: string } {
  const workload = labels.workload || labels.pod || labels.service_name || labels.job || "";
  let pod = labels.pod ?? "";
  if (pod.startsWith(workload + "-")) pod = pod.slice(workload.length + 1).replace(/^[0-9a-z]{5,10}-(?=[0-9a-z]{5}$)/, "");
  return { workload, pod: pod === workload ? "" : pod };
}

export interface Group {
  first: LogLine;
  last: LogLine;
  count: number;
}

/** Lines of one writer that differ only by numbers once, at the place of the first one, with how many they are. */
export function groupLines(lines: LogLine[]): Group[] {
  const groups = new Map<string, Group>();
  for (const l of lines) {
    const key = JSON.stringify([l.labels.namespace, l.labels.pod, l.labels.container, l.labels.job, l.line.replace(/[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|\d+(\.\d+)?/gi, "#")]);
    const known = groups.get(key);
    if (known) {
      known.count++;
      known.last = l;
    } else groups.set(key, { first: l, last: l, count: 1 });
  }
  return [...groups.values()];
}

/** A text in a query, in quotes. */
export function quote(text: string): string {
  return JSON.stringify(text);
}

export interface Choice {
  namespaces?: string[];
  workload?: string;
  pod?: string;
  container?: string;
  text?: string;
}

/** The LogQL query of choices that were made without writing one. */
export function queryOf(c: Choice): string {
  const matchers: string[] = ['job="pods"'];
  const escape = (t: string) => t.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  if (c.namespaces?.length === 1) matchers.push(`namespace=${quote(c.namespaces[0]!)}`);
  else if (c.namespaces?.length) matchers.push(`namespace=~${quote(c.namespaces.map(escape).join("|"))}`);
  if (c.workload) matchers.push(`workload=${quote(c.workload)}`);
  if (c.pod) matchers.push(`pod=${quote(c.pod)}`);
  if (c.container) matchers.push(`container=${quote(c.container)}`);
  return `{${matchers.join(", ")}}${c.text ? ` |= ${quote(c.text)}` : ""}`;
}

/** The logs of a container until it ended, as the parameters of their view. */
export function beforeEnd(namespace: string, pod: string, container: string, finished: number): Change {
  return { q: queryOf({ namespaces: [namespace], pod, container }), t: timeParam(finished + 1000), w: "5m" };
}

/** Whether a query is for numbers rather than lines. */
export function isMetricQuery(query: string): boolean {
  return !/^\s*\{/.test(query);
}

/** The part of a log query that selects streams, and the rest. */
export function streamSelector(query: string): string {
  let quoted = "";
  for (let i = 0; i < query.length; i++) {
    const c = query[i]!;
    if (quoted) {
      if (c === "\\" && quoted === '"') i++;
      else if (c === quoted) quoted = "";
    } else if (c === '"' || c === "`") quoted = c;
    else if (c === "}") return query.slice(0, i + 1);
  }
  return query;
}

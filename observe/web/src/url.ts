// The URL is the state of the page: the path says which view, the query everything else. This file has no effects.

/** A place in the page. The parts of the path are decoded: they may be any text. */
export interface Place {
  path: string[];
  query: URLSearchParams;
}

/** Parameters that every view keeps: the end and length of the time that is shown, and the namespaces. */
export const kept = ["t", "w", "ns"];

export const windows = ["5m", "15m", "1h", "3h", "6h", "1d", "2d", "7d"];
export const windowWords: Record<string, string> = { "5m": "5 minutes", "15m": "15 minutes", "1h": "hour", "3h": "3 hours", "6h": "6 hours", "1d": "day", "2d": "2 days", "7d": "week" };
export const defaultWindow = "15m";

export function parsePlace(url: string): Place {
  const u = new URL(url, "http://page.invalid");
  const path: string[] = [];
  for (const part of u.pathname.split("/")) {
    if (part === "") continue;
    try {
      path.push(decodeURIComponent(part));
    } catch {
      path.push(part); // not an escape: it stands for itself
    }
  }
  return { path, query: u.searchParams };
}

export function formatPlace(path: string[], query: URLSearchParams): string {
  const text = query.toString();
  return "/" + path.map(encodeURIComponent).join("/") + (text ? "?" + text : "");
}

export type Change = Record<string, string | number | string[] | undefined>;

/** The query with some parameters set, or removed by undefined or an empty text. */
export function change(query: URLSearchParams, by: Change): URLSearchParams {
  const next = new URLSearchParams(query);
  for (const [name, value] of Object.entries(by)) {
    next.delete(name);
    if (value === undefined || value === "") continue;
    for (const v of Array.isArray(value) ? value : [String(value)]) next.append(name, v);
  }
  return next;
}

/** The URL of a view from another one: it keeps time and namespaces. */
export function placeOf(from: Place, path: string[], query: Change = {}): string {
  const next = new URLSearchParams();
  for (const name of kept) {
    for (const value of from.query.getAll(name)) next.append(name, value);
  }
  return formatPlace(path, change(next, query));
}

/** The filters of a view: its parameters, without those that all views keep, what is selected in it, and whether it is live. */
export function filtersOf(query: URLSearchParams): Change {
  const by: Change = {};
  for (const name of new Set(query.keys())) {
    if (!kept.includes(name) && name !== "sel" && name !== "tail") by[name] = query.getAll(name);
  }
  return by;
}

/** A link from the store, as path of this page, or undefined if it leads elsewhere. */
export function ownPath(link: string): Place | undefined {
  if (!/^\/(?![/\\])/.test(link)) return undefined;
  return parsePlace(link);
}

const units: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000, w: 604_800_000 };

/** Milliseconds of a duration such as 1h30m, or undefined. */
export function parseDuration(text: string): number | undefined {
  if (!/^(\d+(ms|[smhdw]))+$/.test(text)) return undefined;
  let sum = 0;
  for (const [, n, unit] of text.matchAll(/(\d+)(ms|[smhdw])/g)) sum += Number(n) * units[unit!]!;
  return sum;
}

/** The text of a duration in milliseconds, as parseDuration reads it. */
export function formatDuration(ms: number): string {
  let rest = Math.max(1000, Math.round(ms / 1000) * 1000);
  let text = "";
  for (const unit of ["d", "h", "m", "s"]) {
    const n = Math.floor(rest / units[unit]!);
    if (n > 0) text += n + unit;
    rest -= n * units[unit]!;
  }
  return text;
}

/** The end of the shown time in milliseconds, undefined if it is now. */
export function endOf(query: URLSearchParams): number | undefined {
  const text = query.get("t");
  if (!text) return undefined;
  const ms = /^\d+$/.test(text) ? Number(text) : Date.parse(text);
  return Number.isFinite(ms) && ms > 0 ? ms : undefined;
}

/** The length of the shown time. */
export function windowOf(query: URLSearchParams): { text: string; ms: number } {
  const text = query.get("w") ?? defaultWindow;
  const ms = parseDuration(text);
  if (ms === undefined || ms < 30_000 || ms > 31 * 86_400_000) return { text: defaultWindow, ms: parseDuration(defaultWindow)! };
  return { text, ms };
}

/** A time as it is in the URL: to the second, in UTC. */
export function timeParam(ms: number): string {
  return new Date(Math.round(ms / 1000) * 1000).toISOString().replace(".000Z", "Z");
}

/** The parameters of the API for the shown time. */
export function timeQuery(query: URLSearchParams): URLSearchParams {
  const q = new URLSearchParams({ window: windowOf(query).text });
  const end = endOf(query);
  if (end !== undefined) q.set("end", String(end));
  return q;
}

// Numbers and times as text. This file has no effects.

/** A rate per second with two or three significant digits. */
export function rate(perSecond: number): string {
  if (perSecond === 0) return "0/s";
  if (perSecond < 0.1) {
    const perMinute = perSecond * 60;
    return (perMinute < 0.1 ? "<0.1" : digits(perMinute)) + "/min";
  }
  return digits(perSecond) + "/s";
}

/** Two or three significant digits, with k and M. */
export function digits(n: number): string {
  const a = Math.abs(n);
  if (a >= 1e9) return trim((n / 1e9).toPrecision(3)) + "G";
  if (a >= 1e6) return trim((n / 1e6).toPrecision(3)) + "M";
  if (a >= 10_000) return trim((n / 1e3).toPrecision(3)) + "k";
  if (a >= 100) return String(Math.round(n));
  if (a >= 10) return trim(n.toFixed(1));
  if (a >= 1) return trim(n.toFixed(2));
  if (a === 0) return "0";
  return trim(n.toPrecision(2));
}

function trim(text: string): string {
  return text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** A share as percent. */
export function percent(share: number): string {
  const p = share * 100;
  if (p === 0) return "0 %";
  if (p < 0.1) return "<0.1 %";
  return (p < 10 ? trim(p.toFixed(1)) : String(Math.round(p))) + " %";
}

/** A duration in milliseconds, for what takes from microseconds to minutes. */
export function ms(value: number): string {
  if (value < 1) return Math.round(value * 1000) + " µs";
  if (value < 10) return trim(value.toFixed(1)) + " ms";
  if (value < 1000) return Math.round(value) + " ms";
  if (value < 60_000) return trim((value / 1000).toFixed(2)) + " s";
  return span(value);
}

/** A long duration in milliseconds: the two largest units. */
export function span(value: number): string {
  const s = Math.max(0, Math.round(value / 1000));
  const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  if (d > 0) return `${d} d${h ? ` ${h} h` : ""}`;
  if (h > 0) return `${h} h${m ? ` ${m} min` : ""}`;
  if (m > 0) return `${m} min${m < 10 && s % 60 ? ` ${s % 60} s` : ""}`;
  return `${s} s`;
}

export function bytes(n: number): string {
  const unit = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1000 && i < unit.length - 1) {
    n /= 1024;
    i++;
  }
  return `${digits(n)} ${unit[i]}`;
}

export function count(n: number, one: string, many: string): string {
  return `${n >= 10_000 ? digits(n) : Math.round(n)} ${Math.round(n) === 1 ? one : many}`;
}

const pad = (n: number, length = 2) => String(n).padStart(length, "0");

/** The time of day in the browser's zone. */
export function clock(time: number, seconds = true): string {
  const d = new Date(time);
  return `${pad(d.getHours())}:${pad(d.getMinutes())}${seconds ? ":" + pad(d.getSeconds()) : ""}`;
}

/** The time of day with milliseconds. */
export function clockMs(time: number): string {
  return `${clock(time)}.${pad(Math.floor(time) % 1000, 3)}`;
}

/** The browser's time zone at a time, with its difference to UTC: "Europe/Berlin (UTC+1)". */
export function zoneOf(time: number): string {
  const minutes = -new Date(time).getTimezoneOffset(), a = Math.abs(minutes);
  const offset = minutes === 0 ? "UTC" : `UTC${minutes < 0 ? "−" : "+"}${Math.floor(a / 60)}${a % 60 ? ":" + pad(a % 60) : ""}`;
  const name = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return !name || name === "UTC" ? offset : `${name} (${offset})`;
}

const months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** The day and time, without the day if it is the same as that of now. */
export function when(time: number, now: number, seconds = false): string {
  const d = new Date(time), n = new Date(now);
  if (d.toDateString() === n.toDateString()) return clock(time, seconds);
  const year = d.getFullYear() === n.getFullYear() ? "" : ` ${d.getFullYear()}`;
  return `${d.getDate()} ${months[d.getMonth()]}${year} ${clock(time, seconds)}`;
}

/** How long ago, as "12 min ago". */
export function ago(time: number, now: number): string {
  const d = now - time;
  if (d < 5000) return "now";
  return `${span(d < 60_000 ? d : Math.round(d / 60_000) * 60_000)} ago`;
}

/** A text as a sentence of its own: it ends with one full stop. */
export function sentence(text: string): string {
  const t = text.trim();
  return t === "" || /[.!?…]$/.test(t) ? t : t + ".";
}

/** A sentence that begins with a capital letter. Only for texts of the project: a name keeps its letters. */
export const capital = (text: string): string => text.slice(0, 1).toUpperCase() + text.slice(1);

/** The parts of a text by whether they are code: what is between backticks. A backtick without a second one is one. */
export function codeParts(text: string): { text: string; code: boolean }[] {
  const parts: { text: string; code: boolean }[] = [];
  let from = 0;
  for (const m of text.matchAll(/`([^`\n]+)`/g)) {
    if (m.index > from) parts.push({ text: text.slice(from, m.index), code: false });
    parts.push({ text: m[1]!, code: true });
    from = m.index + m[0].length;
  }
  if (from < text.length) parts.push({ text: text.slice(from), code: false });
  return parts;
}

/** The first characters of a long id. */
export function short(id: string): string {
  return id.length > 12 ? id.slice(0, 8) + "…" : id;
}

/** Cells as CSV. A cell that a spreadsheet would calculate gets an apostrophe: names come from others. */
export function csv(rows: (string | number)[][]): string {
  return rows.map((row) => row.map((cell) => {
    if (typeof cell === "number") return String(cell);
    const safe = /^[=+\-@\t\r]/.test(cell) ? "'" + cell : cell;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }).join(",")).join("\r\n") + "\r\n";
}

/** Milliseconds of a Go duration such as 1m30s or 500ms. */
export function durationMs(text: string): number {
  const unit: Record<string, number> = { ns: 1e-6, us: 1e-3, "µs": 1e-3, ms: 1, s: 1000, m: 60_000, h: 3_600_000 };
  let sum = 0;
  for (const [, n, u] of text.matchAll(/([\d.]+)(ns|us|µs|ms|s|m|h)/g)) sum += Number(n) * unit[u!]!;
  return sum;
}

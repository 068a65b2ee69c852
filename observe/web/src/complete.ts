// Completion in the two query boxes: what can follow at the cursor. This file has no effects.

export interface Completion {
  /** What is replaced: from here to the cursor. */
  from: number;
  /** What is being written. */
  word: string;
  kind: "label" | "value" | "name" | "function" | "pipe" | "none";
  /** For values: of which label. */
  label?: string;
}

/** What is being written at the cursor of a LogQL or PromQL query. */
export function completionAt(text: string, cursor: number, language: "logql" | "promql"): Completion {
  const before = text.slice(0, cursor);
  let depth = 0, open = -1, quoted = -1;
  for (let i = 0; i < before.length; i++) {
    const c = before[i]!;
    if (quoted >= 0) {
      if (c === "\\" && before[quoted] === '"') i++;
      else if (c === before[quoted]) quoted = -1;
    } else if (c === '"' || c === "`") quoted = i;
    else if (c === "{") {
      depth++;
      open = i;
    } else if (c === "}") depth = Math.max(0, depth - 1);
  }
  if (depth > 0) {
    if (quoted >= 0) {
      const label = /([A-Za-z_]\w*)\s*(?:=~|!~|!=|=)\s*$/.exec(before.slice(open + 1, quoted));
      return { from: quoted + 1, word: before.slice(quoted + 1), kind: label ? "value" : "none", ...(label ? { label: label[1]! } : {}) };
    }
    const word = /[A-Za-z_]\w*$/.exec(before)?.[0] ?? "";
    const start = cursor - word.length;
    return { from: start, word, kind: /[{,]\s*$/.test(before.slice(open, start)) ? "label" : "none" };
  }
  if (quoted >= 0) return { from: cursor, word: "", kind: "none" };
  if (language === "logql") {
    const pipe = /\|\s*([a-z_]*)$/.exec(before);
    if (pipe && /[}"`]\s*(\|[^|]*)*$|[a-z_]\s*\|\s*[a-z_]*$/.test(before)) return { from: cursor - pipe[1]!.length, word: pipe[1]!, kind: "pipe" };
  }
  const word = /[A-Za-z_:][\w:]*$/.exec(before)?.[0] ?? "";
  return { from: cursor - word.length, word, kind: word === "" ? "none" : language === "logql" ? "function" : "name" };
}

export const logqlPipes = ["json", "logfmt", "pattern", "regexp", "unpack", "line_format", "label_format", "decolorize", "keep", "drop", "unwrap"];
export const logqlFunctions = [
  "sum by ()", "topk()", "count_over_time({} [5m])", "rate({} [5m])", "bytes_rate({} [5m])", "bytes_over_time({} [5m])", "absent_over_time({} [5m])",
  "quantile_over_time(0.99, {} | unwrap x [5m])", "avg_over_time({} | unwrap x [5m])", "max_over_time({} | unwrap x [5m])",
];
export const promqlFunctions = [
  "sum by ()", "avg by ()", "max by ()", "min by ()", "count by ()", "topk()", "bottomk()", "quantile()", "rate()", "increase()", "irate()", "histogram_quantile()",
  "avg_over_time()", "max_over_time()", "min_over_time()", "sum_over_time()", "last_over_time()", "changes()", "deriv()", "predict_linear()", "absent()", "clamp_min()", "label_replace()", "time()", "vector()",
];

/** The candidates that have a word in them, those that begin with it first. */
export function suggest(candidates: string[], word: string, most = 12): string[] {
  const w = word.toLowerCase();
  const rank = (c: string) => {
    const i = c.toLowerCase().indexOf(w);
    return i < 0 ? -1 : i === 0 ? 0 : 1;
  };
  return candidates
    .map((c) => ({ c, r: rank(c) }))
    .filter(({ c, r }) => r >= 0 && c !== word)
    .sort((a, b) => a.r - b.r || a.c.length - b.c.length || (a.c < b.c ? -1 : 1))
    .slice(0, most)
    .map(({ c }) => c);
}

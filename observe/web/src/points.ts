// Points of series in time. This file has no effects.

type Points = [number, number][];

/** One array of times in seconds for all series, as uPlot wants it, and their values. Where points are missing there is a null: nothing was measured. */
export function align(series: { points: Points }[]): [number[], ...(number | null)[][]] {
  const times = [...new Set(series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  const step = times.reduce((least, t, i) => (i > 0 ? Math.min(least, t - times[i - 1]!) : least), Infinity);
  const all = times.flatMap((t, i) => (i > 0 && t - times[i - 1]! > 1.5 * step ? [times[i - 1]! + step, t] : [t]));
  const index = new Map(all.map((t, i) => [t, i]));
  return [
    all.map((t) => t / 1000),
    ...series.map((s) => {
      const values: (number | null)[] = new Array(all.length).fill(null);
      for (const [t, v] of s.points) values[index.get(t)!] = v;
      return values;
    }),
  ];
}

/** The indexes of values without a neighbor: no line leads to them. */
export function isolated(values: ArrayLike<number | null | undefined>): number[] {
  const found: number[] = [];
  for (let i = 0; i < values.length; i++) if (values[i] != null && values[i - 1] == null && values[i + 1] == null) found.push(i);
  return found;
}

export interface Buckets {
  /** The length of each in milliseconds. */
  step: number;
  count: number;
}

/** Divides a time into at most `most` equal parts of at least 15 seconds: none of them reaches beyond it. */
export function bucketsOf(start: number, end: number, most = 90): Buckets {
  const count = Math.min(most, Math.max(1, Math.floor((end - start) / 15_000)));
  return { step: Math.floor((end - start) / count), count };
}

/** Counts by the ends of their buckets, as points in the middle of all buckets: what is empty is 0. */
export function countsIn(points: Points, start: number, { step, count }: Buckets): Points {
  const at = new Map(points.map(([t, v]) => [Math.round((t - start) / step), v]));
  return Array.from({ length: count }, (_, i): [number, number] => [start + (i + 0.5) * step, at.get(i + 1) ?? 0]);
}

/** A value with a line and words across a chart. */
export interface Limit {
  value: number;
  label: string;
}

/** The highest value of a scale: the lowest limit is always on it, a higher one only if it does not flatten everything else. */
export function scaleTop(highest: number, limits: Limit[]): number {
  const values = limits.map((l) => l.value).sort((a, b) => a - b);
  let top = Math.max(highest, values[0] ?? 0);
  for (const v of values) if (v <= 2 * top) top = Math.max(top, v);
  return top * 1.1 || 1;
}

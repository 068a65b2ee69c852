// Paths of SVG. This file has no effects.

export interface Point {
  x: number;
  y: number;
}

const p = (q: Point) => `${q.x.toFixed(1)} ${q.y.toFixed(1)}`;

/** A path through points that leaves and reaches each of them along one axis: an arrow at its end points into its node. */
export function flow(points: Point[], axis: "x" | "y"): string {
  if (points.length < 2) return "";
  let path = `M${p(points[0]!)}`;
  for (let i = 1; i < points.length; i++) {
    const a = points[i - 1]!, b = points[i]!;
    const x = (a.x + b.x) / 2, y = (a.y + b.y) / 2;
    path += axis === "x" ? `C${p({ x, y: a.y })} ${p({ x, y: b.y })} ${p(b)}` : `C${p({ x: a.x, y })} ${p({ x: b.x, y })} ${p(b)}`;
  }
  return path;
}

/** A path through points, with round corners. */
export function curve(points: Point[]): string {
  if (points.length < 2) return "";
  let path = `M${p(points[0]!)}`;
  for (let i = 1; i < points.length - 1; i++) {
    const a = points[i]!, b = points[i + 1]!;
    path += i === points.length - 2 ? `Q${p(a)} ${p(b)}` : `Q${p(a)} ${p({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 })}`;
  }
  if (points.length === 2) path += `L${p(points[1]!)}`;
  return path;
}

/** The areas below a line, one for each part of it without a gap. */
export function areas(points: [number, number][], gap: number, x: (t: number) => string, y: (v: number) => string, bottom: number): string {
  let path = "";
  points.forEach(([t, v], i) => {
    const before = points[i - 1], after = points[i + 1];
    if (!before || t - before[0] > gap) path += `M${x(t)} ${bottom}`;
    path += `L${x(t)} ${y(v)}`;
    if (!after || after[0] - t > gap) path += `L${x(t)} ${bottom}Z`;
  });
  return path;
}

// Charts of series in time, with the changes in the cluster as marks. Dragging over one chooses its time.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import type { Line, Mark } from "./api";
import { clock, when } from "./format";
import { Icon } from "./icons";
import { markColors, placeMarks } from "./marks";
import { align, isolated, type Limit, scaleTop } from "./points";
import { colors, now, set } from "./state";
import { formatDuration, timeParam } from "./url";

export interface Series {
  label: string;
  points: [number, number][];
  /** A custom property of the style sheet, without the dashes. */
  color: string;
  dash?: number[];
  fill?: boolean;
}

export const markWords: Record<Mark["kind"], string> = { deploy: "Deploy", rollout: "Rollout", restart: "Restart", oom: "Out of memory", evict: "Eviction", node: "Node" };

/** A mark in a sentence. */
export const markText = (m: Mark, seconds: boolean): string => `${when(m.time, now(), seconds)} ${markWords[m.kind]}${m.workload ? `, ${m.workload}` : ""}: ${m.text}`;

/** The series of an answer, each with its color and kind of line. */
export function seriesOf(lines: Line[], label: string, styles: Record<string, Omit<Series, "label" | "points"> & { label?: string }>): Series[] {
  return lines.map((l) => {
    const name = l.labels?.[label] ?? "";
    return { points: l.points, ...(styles[name] ?? palette(name)), label: styles[name]?.label ?? (name || "value") };
  });
}

const dashes = [[], [6, 3], [2, 3], [10, 3, 2, 3], [4, 2, 1, 2]];
/** A color and a kind of line for the n-th series, or for a name. */
export function palette(of: number | string): { color: string; dash: number[] } {
  let n = 0;
  if (typeof of === "number") n = of;
  else for (const c of of) n = (n * 31 + c.charCodeAt(0)) >>> 0;
  return { color: `c${(n % 8) + 1}`, dash: dashes[Math.floor(n / 8) % dashes.length]! };
}

export const classStyles = {
  "2xx": { color: "c-ok", label: "2xx", fill: true },
  "3xx": { color: "c3", label: "3xx", dash: [2, 3] },
  "4xx": { color: "c-warn", label: "4xx", dash: [6, 3] },
  "5xx": { color: "c-bad", label: "5xx", dash: [10, 3, 2, 3] },
  "0xx": { color: "c8", label: "no response", dash: [2, 2] },
  "1xx": { color: "c4", label: "1xx", dash: [2, 3] },
};
export const quantileStyles = {
  "0.5": { color: "c1", label: "p50" },
  "0.95": { color: "c2", label: "p95", dash: [6, 3] },
  "0.99": { color: "c5", label: "p99", dash: [2, 3] },
};

const group = uPlot.sync("page");
const powersOfTwo = Array.from({ length: 50 }, (_, i) => 2 ** i);

export function Chart({ title, series, start, end, format, marks = [], height = 150, limits = [], note, binary = false, bars, empty = "Nothing was measured in this time." }: {
  title: string; series: Series[]; start: number; end: number; format: (value: number) => string; marks?: Mark[]; height?: number; limits?: Limit[]; empty?: string;
  /** A text beside the title. */
  note?: string;
  /** The scale has multiples of 1024. */
  binary?: boolean;
  /** Points are counts of this many milliseconds, in their middle: they are drawn as bars. */
  bars?: number;
}) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | undefined>(undefined);
  const inside = useMemo(() => marks.filter((m) => m.time >= start && m.time <= end), [marks, start, end]);
  const some = series.some((s) => s.points.length > 0);
  const shape = JSON.stringify([series.map((s) => [s.label, s.color, s.dash]), limits, height, bars]);
  // Where the plot is within the chart: the marks stand above its lines.
  const [area, setArea] = useState({ left: 0, width: 0 });
  const drawn = colors.value;

  useEffect(() => {
    const host = box.current;
    if (!host || !some) return;
    const style = getComputedStyle(host);
    // A canvas does not know light-dark(): the colors are those of elements.
    const probe = document.createElement("i");
    host.append(probe);
    const color = (name: string) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    const muted = color("muted"), grid = color("line-soft"), bad = color("bad");
    const markColor = Object.fromEntries(Object.entries(markColors).map(([kind, name]) => [kind, color(name)]));
    const font = `11px ${style.fontFamily}`;
    const axis = { stroke: muted, font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 } };
    const u = new uPlot(
      {
        width: Math.max(120, host.clientWidth), height,
        cursor: { sync: { key: group.key }, drag: { x: true, y: false, setScale: false }, points: { size: 6 }, y: false },
        select: { show: true, left: 0, top: 0, width: 0, height: 0 },
        legend: { live: true, markers: { dash: (_u, i) => borderOf(series[i - 1]?.dash) } },
        scales: { x: { time: true, range: () => [bounds.start / 1000, bounds.end / 1000] }, y: { range: (_u, low, high) => [Math.min(0, low ?? 0), scaleTop(high ?? 0, limits)] } },
        axes: [
          { ...axis, space: 70, size: 26, values: (_u, ticks) => ticks.map((t, i) => label(t * 1000, i === 0 ? undefined : ticks[i - 1]! * 1000, ticks.length > 1 ? (ticks[1]! - ticks[0]!) * 1000 : 60_000)) },
          { ...axis, size: 58, space: 26, ...(binary ? { incrs: powersOfTwo } : {}), values: (_u, ticks) => ticks.map(format) },
        ],
        series: [
          { value: (_u, t) => (t == null ? "" : bars ? `${when(t * 1000 - bars / 2, now(), true)} – ${clock(t * 1000 + bars / 2)}` : when(t * 1000, now(), true)) },
          ...series.map((s) => ({
            label: s.label, stroke: color(s.color), width: bars ? 1 : 1.5, dash: s.dash ?? [], spanGaps: false,
            ...(bars ? { paths: uPlot.paths.bars!({ size: [0.9, Infinity] }), points: { show: false } } : { points: { show: true, size: 4, fill: color(s.color), filter: (u: uPlot, i: number) => isolated(u.data[i]!) } }),
            value: (_u: uPlot, v: number | null) => (v == null ? "–" : format(v)),
            ...(s.fill ? { fill: color(s.color).replace(/^rgb\((.*)\)$/, `rgba($1, ${bars ? 0.35 : 0.1})`) } : {}),
          })),
        ],
        hooks: {
          draw: [
            (u) => {
              const c = u.ctx, r = devicePixelRatio;
              const left = u.bbox.left / r, width = u.bbox.width / r;
              setArea((a) => (a.left === left && a.width === width ? a : { left, width }));
              c.save();
              for (const m of current.inside) {
                const x = Math.round(u.valToPos(m.time / 1000, "x", true));
                c.strokeStyle = markColor[m.kind] ?? muted;
                c.lineWidth = r;
                c.setLineDash([3 * r, 3 * r]);
                c.beginPath();
                c.moveTo(x, u.bbox.top);
                c.lineTo(x, u.bbox.top + u.bbox.height);
                c.stroke();
              }
              for (const limit of limits) {
                const y = Math.round(u.valToPos(limit.value, "y", true));
                if (y < u.bbox.top) continue; // above the scale
                c.strokeStyle = bad;
                c.setLineDash([8 * r, 4 * r]);
                c.beginPath();
                c.moveTo(u.bbox.left, y);
                c.lineTo(u.bbox.left + u.bbox.width, y);
                c.stroke();
                c.setLineDash([]);
                c.fillStyle = bad;
                c.font = `${11 * r}px ${style.fontFamily}`;
                c.textAlign = "right";
                c.textBaseline = "bottom";
                c.fillText(limit.label, u.bbox.left + u.bbox.width - 4 * r, y - 2 * r);
              }
              c.restore();
            },
          ],
          // Without the pointer the legend has the last values.
          setCursor: [(u) => { if (u.cursor.idx == null) last(u); }],
          setData: [(u) => { if (u.cursor.idx == null) last(u); }],
          ready: [last],
          setSelect: [
            (u) => {
              if (u.select.width < 6) return;
              const from = u.posToVal(u.select.left, "x") * 1000, to = u.posToVal(u.select.left + u.select.width, "x") * 1000;
              u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
              set({ t: timeParam(to), w: formatDuration(Math.max(60_000, to - from)) });
            },
          ],
        },
      },
      align(series), host,
    );
    probe.remove();
    plot.current = u;
    const resize = new ResizeObserver(() => {
      u.setSize({ width: Math.max(120, host.clientWidth), height });
      // A long legend scrolls, also by keyboard.
      const legend = u.root.querySelector<HTMLElement>(".u-legend");
      if (legend) legend.tabIndex = legend.scrollHeight > legend.clientHeight ? 0 : -1;
    });
    resize.observe(host);
    return () => {
      resize.disconnect();
      u.destroy();
      plot.current = undefined;
    };
    // The plot is made again when its series or colors change; new points go into the same one.
  }, [shape, some, drawn]);

  const bounds = useRef({ start, end }).current;
  bounds.start = start;
  bounds.end = end;
  const current = useRef({ inside }).current;
  current.inside = inside;
  useEffect(() => {
    plot.current?.setData(align(series));
  }, [series, start, end, inside]);

  return (
    <figure class="chart">
      <figcaption>
        {title}{note && <small> {note}</small>}
        <span class="unseen">. {summary(series, start, end, format)}{inside.length > 0 ? ` ${inside.length} changes: ${inside.slice(0, 5).map((m) => `${clock(m.time)} ${m.text}`).join("; ")}.` : ""}</span>
      </figcaption>
      {some ? (
        <>
          <div class="marks" aria-hidden="true">
            {area.width > 0 && placeMarks(inside, (t) => ((t - start) / (end - start)) * area.width).map(({ mark: m, at, all }) => (
              <span key={`${m.time}${m.kind}${m.text}`} class={`mark ${m.kind}`} title={all.slice(0, 12).map((x) => markText(x, true)).join("\n")} style={{ insetInlineStart: `${(area.left + at).toFixed(1)}px` }}>
                <Icon name={m.kind} size={11} />
              </span>
            ))}
          </div>
          <div class="plot" ref={box} />
        </>
      ) : (
        <p class="nothing" style={{ blockSize: `${Math.min(height, 90)}px` }}>{empty}</p>
      )}
    </figure>
  );
}

/** The border of the legend that looks like a dash of a line. */
const borderOf = (dash: number[] = []): string => (dash.length === 0 ? "solid" : dash[0]! < 3 ? "dotted" : "dashed");

function last(u: uPlot): void {
  const idx = u.data[0].length - 1;
  if (idx >= 0) u.setLegend({ idx }, false);
}

function label(t: number, before: number | undefined, step: number): string {
  const day = before === undefined || new Date(t).toDateString() !== new Date(before).toDateString();
  if (step >= 86_400_000) return when(t, 0).split(" ").slice(0, 2).join(" ");
  if (day && before !== undefined) return when(t, 0).split(" ").slice(0, 2).join(" ");
  return clock(t, step < 60_000);
}

/** The chart in a sentence. */
export function summary(series: Series[], start: number, end: number, format: (v: number) => string): string {
  const parts = series.filter((s) => s.points.length > 0).slice(0, 8).map((s) => {
    const values = s.points.map((p) => p[1]);
    return `${s.label}: last ${format(values.at(-1)!)}, highest ${format(values.reduce((a, b) => Math.max(a, b)))}`;
  });
  return `From ${clock(start, false)} to ${clock(end, false)}. ${parts.length > 0 ? parts.join("; ") + "." : "Nothing was measured."}`;
}

import { useEffect, useMemo, useState } from "preact/hooks";
import { api, type Mark, useData } from "../api";
import { Chart, palette, type Series } from "../chart";
import { completionAt, promqlFunctions, suggest } from "../complete";
import { bytes, digits, ms, percent } from "../format";
import { prepared } from "../prepared";
import { now, place, set } from "../state";
import { Suggest, type Suggestion } from "../suggest";
import { Empty, Export, Panel, Waiting } from "../ui";
import { endOf, timeQuery, windowOf } from "../url";
import { type Matrix, seriesLines } from "./logs";

export function MetricsView() {
  const q = place.value.query;
  const query = q.get("q") ?? "";
  const [text, setText] = useState(query);
  useEffect(() => setText(query), [query]);
  const run = (t: string) => set({ q: t.trim() || undefined });
  return (
    <>
      <div class="head"><h1>Metrics</h1></div>
      <QueryBox text={text} onText={setText} onEnter={run} />
      <div class="quick" role="group" aria-label="Prepared queries">
        {prepared.map((p) => <button key={p.text} type="button" aria-pressed={p.query === query} onClick={() => run(p.query)}>{p.text}</button>)}
      </div>
      {query ? <Result query={query} /> : (
        <Empty title="Write a PromQL query" icon="metrics"><p>Or begin with one of those above: the five metrics of Istio that the guide names are the first ones.</p></Empty>
      )}
    </>
  );
}

function QueryBox({ text, onText, onEnter }: { text: string; onText: (t: string) => void; onEnter: (t: string) => void }) {
  const [cursor, setCursor] = useState(0);
  const [focused, setFocused] = useState(false);
  const c = completionAt(text, cursor, "promql");
  const metric = /([A-Za-z_:][\w:]*)\s*\{[^}]*$/.exec(text.slice(0, cursor))?.[1];
  const match = metric ? `match[]=${encodeURIComponent(metric)}` : "";
  const names = useData<{ data: string[] }>(focused ? "/api/v1/label/__name__/values" : undefined, false);
  const labels = useData<{ data: string[] }>(focused && c.kind === "label" ? `/api/v1/labels?${match}` : undefined, false);
  const values = useData<{ data: string[] }>(focused && c.kind === "value" ? `/api/v1/label/${encodeURIComponent(c.label!)}/values?${match}` : undefined, false);
  const replace = (word: string, after = "", back = 0) => () => ({ text: text.slice(0, c.from) + word + after + text.slice(cursor), cursor: c.from + word.length + after.length - back });
  let list: Suggestion[] = [];
  if (c.kind === "label") list = suggest((labels.data?.data ?? []).filter((l) => l !== "__name__"), c.word).map((l) => ({ id: l, text: l, detail: "label", apply: replace(l, '="') }));
  else if (c.kind === "value") list = suggest(values.data?.data ?? [], c.word).map((v) => ({ id: v, text: v, detail: c.label!, apply: replace(JSON.stringify(v).slice(1, -1), text[cursor] === '"' ? "" : '"') }));
  else if (c.kind === "name") {
    list = [
      ...suggest(names.data?.data ?? [], c.word, 10).map((n) => ({ id: "m" + n, text: n, detail: "metric", apply: replace(n) })),
      ...suggest(promqlFunctions, c.word, 4).map((f) => ({ id: "f" + f, text: f, detail: "function", apply: replace(f, "", 1) })),
    ];
  }
  return (
    <div class="query">
      <Suggest label="PromQL query" mono placeholder="sum by (namespace) (rate(istio_requests_total[5m]))" value={text} suggestions={list} onInput={(t, at) => { onText(t); setCursor(at); setFocused(true); }} onEnter={onEnter} />
      <button type="button" class="primary" onClick={() => onEnter(text)}>Run</button>
    </div>
  );
}

/** How values are written, guessed from the names in the query. */
function formatOf(query: string): (v: number) => string {
  if (/_bucket|milliseconds/.test(query) && /quantile/.test(query)) return /seconds/.test(query) && !/milliseconds/.test(query) ? (v) => ms(v * 1000) : ms;
  if (/\)\s*\/\s*(sum|rate|count)/.test(query)) return percent;
  if (/_bytes/.test(query) && !/count|_total\{/.test(query)) return bytes;
  return digits;
}

const mostSeries = 100;

function Result({ query }: { query: string }) {
  const q = place.value.query;
  const window = windowOf(q).ms, fixed = endOf(q);
  const end = fixed ?? Math.floor(now() / 5000) * 5000, start = end - window;
  const step = Math.max(15, Math.ceil(window / 1000 / 250));
  const answer = useData<Matrix>(`/api/v1/query_range?${new URLSearchParams({ query, start: String(start / 1000), end: String(end / 1000), step: String(step), limit: String(mostSeries + 1) })}`, false);
  const marks = useData<{ marks: Mark[] }>(api("marks", timeQuery(q)), false);
  const format = formatOf(query);
  const rows = useMemo(() => {
    const lines = answer.data ? seriesLines(answer.data) : [];
    return lines.slice(0, mostSeries).map((l, i) => ({ ...l, name: nameOf(l.labels ?? {}), last: l.points.at(-1)?.[1], index: i })).sort((a, b) => (b.last ?? -Infinity) - (a.last ?? -Infinity));
  }, [answer.data]);
  const series: Series[] = rows.slice(0, 20).map((r, i) => ({ label: legendOf(r.labels ?? {}, r.name), points: r.points, ...palette(i) }));
  return (
    <Panel actions={answer.data && <Export name="metrics" json={() => answer.data} rows={() => [["series", "time", "value"], ...rows.flatMap((r) => r.points.map(([t, v]) => [r.name, new Date(t).toISOString(), v]))]} />}>
      <Waiting of={answer}>
        {() => rows.length === 0 ? <Empty title="No series" icon="metrics"><p>The query is right, and nothing matches in this time.</p></Empty> : (
          <>
            <Chart title={query} series={series} start={start} end={end} format={format} binary={format === bytes} marks={marks.data?.marks ?? []} height={300} />
            {rows.length > 20 && <p class="muted">{`The 20 highest of ${rows.length > mostSeries - 1 ? "more than " : ""}${rows.length} series are drawn.`}</p>}
            <div class="table" tabIndex={0} role="region" aria-label="Series">
              <table>
                <caption class="unseen">Series with their last values</caption>
                <thead><tr><th scope="col">Series</th><th scope="col" class="number">Last</th><th scope="col" class="number">Lowest</th><th scope="col" class="number">Highest</th></tr></thead>
                <tbody>
                  {rows.map((r) => {
                    const values = r.points.map((p) => p[1]);
                    return <tr key={r.index}><th scope="row"><code>{r.name}</code></th><td class="number" data-label="Last">{r.last === undefined ? "–" : format(r.last)}</td><td class="number" data-label="Lowest">{values.length ? format(values.reduce((a, b) => Math.min(a, b))) : "–"}</td><td class="number" data-label="Highest">{values.length ? format(values.reduce((a, b) => Math.max(a, b))) : "–"}</td></tr>;
                  })}
                </tbody>
              </table>
            </div>
          </>
        )}
      </Waiting>
    </Panel>
  );
}

/** In the legend the value of an only label is enough. */
function legendOf(labels: Record<string, string>, name: string): string {
  const values = Object.values(labels);
  return values.length === 1 && !labels.__name__ ? values[0]! : name;
}

function nameOf(labels: Record<string, string>): string {
  const { __name__: name, ...rest } = labels;
  const inner = Object.entries(rest).map(([k, v]) => `${k}=${JSON.stringify(v)}`).join(", ");
  return (name ?? "") + (inner || !name ? `{${inner}}` : "");
}

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Access, api, get, type Line, type Mark, useData } from "../api";
import { Chart, seriesOf } from "../chart";
import { completionAt, logqlFunctions, logqlPipes, suggest } from "../complete";
import { bytes, clockMs, count, digits, span } from "../format";
import { Icon } from "../icons";
import { compareTimes, groupLines, isMetricQuery, linesOf, type LogLine as Entry, type LokiStream, parseLine, queryOf, quote, streamSelector } from "../logs";
import { LogLine } from "../logline";
import { bucketsOf, countsIn } from "../points";
import { live, now, place, set, store } from "../state";
import { Suggest, type Suggestion } from "../suggest";
import { Empty, Export, Flag, Link, Panel, Waiting } from "../ui";
import { endOf, timeQuery, windowOf } from "../url";
import { LineLinks } from "./request";

const loki = "/loki/api/v1/";
const pageLimit = 500, most = 5000;

/** The bounds of the shown time in Unix nanoseconds, to the second so that the same question has the same URL. */
function range(query: URLSearchParams): { start: number; end: number } {
  const end = Math.ceil((endOf(query) ?? now()) / 1000) * 1000;
  return { start: end - windowOf(query).ms, end };
}

export function LogsView() {
  const q = place.value.query;
  const query = q.get("q") || queryOf({ namespaces: q.getAll("ns") });
  const [text, setText] = useState(query);
  useEffect(() => setText(query), [query]);
  const metric = isMetricQuery(query);
  const tailing = q.get("tail") === "1" && live.value && !metric;
  return (
    <>
      <div class="head">
        <h1>Logs</h1>
        <div class="tools">
          <Flag name="wrap">Wrap</Flag>
          <Flag name="group">Group alike</Flag>
          {!store.value?.offline && (
            <button type="button" class={tailing ? "primary" : ""} aria-pressed={tailing} disabled={metric} onClick={() => set({ tail: tailing ? undefined : "1", t: undefined })}>
              <Icon name={tailing ? "pause" : "play"} />{tailing ? "Live" : "Live tail"}
            </button>
          )}
        </div>
      </div>
      <QueryBox text={text} onText={setText} onEnter={(t) => set({ q: t.trim() || undefined })} />
      <QuickFilters query={query} />
      {metric ? <MetricLogs query={query} /> : tailing ? <Tail query={query} /> : <Lines query={query} key={query} />}
    </>
  );
}

/** The box with the query, which knows labels and their values. */
function QueryBox({ text, onText, onEnter }: { text: string; onText: (t: string) => void; onEnter: (t: string) => void }) {
  const [cursor, setCursor] = useState(0);
  const [focused, setFocused] = useState(false);
  const c = completionAt(text, cursor, "logql");
  const times = useMemo(() => {
    const { start, end } = range(place.peek().query);
    return `start=${start}000000&end=${end}000000`;
  }, [place.value, focused]);
  const labels = useData<{ data?: string[] }>(focused && c.kind === "label" ? `${loki}labels?${times}` : undefined, false);
  const values = useData<{ data?: string[] }>(focused && c.kind === "value" ? `${loki}label/${encodeURIComponent(c.label!)}/values?${times}` : undefined, false);
  const replace = (word: string, after = "") => () => {
    const next = text.slice(0, c.from) + word + after + text.slice(cursor);
    return { text: next, cursor: c.from + word.length + after.length };
  };
  let list: Suggestion[] = [];
  if (c.kind === "label") list = suggest(labels.data?.data ?? [], c.word).map((l) => ({ id: l, text: l, detail: "label", apply: replace(l, '="') }));
  else if (c.kind === "value") list = suggest(values.data?.data ?? [], c.word).map((v) => ({ id: v, text: v, detail: c.label!, apply: replace(JSON.stringify(v).slice(1, -1), text[cursor] === '"' ? "" : '"') }));
  else if (c.kind === "pipe") list = suggest(logqlPipes, c.word).map((p) => ({ id: p, text: p, detail: "stage", apply: replace(p, " ") }));
  else if (c.kind === "function") list = suggest(logqlFunctions, c.word, 8).map((f) => ({ id: f, text: f, detail: "function", apply: replace(f) }));
  return (
    <div class="query">
      <Suggest
        label="LogQL query" mono placeholder='{namespace="shop"} |= "error"' value={text} suggestions={list}
        onInput={(t, at) => { onText(t); setCursor(at); setFocused(true); }} onEnter={onEnter}
      />
      <button type="button" class="primary" onClick={() => onEnter(text)}>Run</button>
    </div>
  );
}

/** Narrows the query without writing one. */
function QuickFilters({ query }: { query: string }) {
  const [find, setFind] = useState("");
  const rest = query.slice(streamSelector(query).length);
  const add = (t: string) => set({ q: `${query} ${t}`.trim() });
  const proxies = /container!="istio-proxy"/.test(query);
  return (
    <div class="quick">
      <label class="field">
        <span class="unseen">Only lines with</span>
        <input type="search" placeholder="Only lines with…" value={find} onInput={(e) => setFind(e.currentTarget.value)} onKeyDown={(e) => {
          if (e.key === "Enter" && find.trim()) {
            add(`|= ${quote(find.trim())}`);
            setFind("");
          }
        }} />
      </label>
      <button type="button" aria-pressed={/\(\?i\)error/.test(rest)} onClick={() => (/\(\?i\)error/.test(rest) ? set({ q: query.replace(/\s*\|~ "\(\?i\)error[^"]*"/, "") }) : add('|~ "(?i)error|fatal|panic|exception| 50[0-9] "'))}>Errors</button>
      <button type="button" aria-pressed={proxies} disabled={isMetricQuery(query)} onClick={() => set({ q: proxies ? query.replace(/,?\s*container!="istio-proxy"/, "") : query.replace(/\}/, query.startsWith("{}") ? 'container!="istio-proxy"}' : ', container!="istio-proxy"}') })}>No proxies</button>
      {(["events", "kernel", "polymesh"] as const).map((job) => <button key={job} type="button" aria-pressed={query.includes(`job="${job}"`)} onClick={() => set({ q: query.includes(`job="${job}"`) ? undefined : `{job="${job}"}` })}>{{ events: "Events", kernel: "Kernel", polymesh: "Server" }[job]}</button>)}
      {query !== queryOf({ namespaces: place.value.query.getAll("ns") }) && <button type="button" onClick={() => set({ q: undefined })}>Reset</button>}
    </div>
  );
}

interface Streams {
  data: { result: LokiStream[] };
}

export interface Matrix {
  data: { resultType: string; result: { metric: Record<string, string>; values: [number, string][] }[] };
}

/** The series of an answer of Prometheus' or Loki's API. */
export const seriesLines = (m: Matrix): Line[] => m.data.result.map((r) => ({ labels: r.metric, points: r.values.map(([t, v]): [number, number] => [t * 1000, Number(v)]).filter(([, v]) => Number.isFinite(v)) }));

function rangeURL(query: string, start: number, end: number, more: Record<string, string>): string {
  return `${loki}query_range?${new URLSearchParams({ query, start: `${start}000000`, end: `${end}000000`, ...more })}`;
}

/** The volume of a log query over time, as the lines' levels cannot be known without reading them. */
function Volume({ query, start, end }: { query: string; start: number; end: number }) {
  const buckets = bucketsOf(start, end), { step } = buckets;
  // Each point counts the lines of the step before it.
  const url = rangeURL(`sum(count_over_time(${query} [${step}ms]))`, start + step, start + buckets.count * step, { step: String(step / 1000) });
  const answer = useData<Matrix>(url, false);
  const marks = useData<{ marks: Mark[] }>(api("marks", timeQuery(place.value.query)), false);
  if (answer.error) return null;
  const lines = answer.data ? seriesLines(answer.data) : [];
  return (
    <Chart
      title={`Lines in ${span(step)}`} series={lines.map((l) => ({ label: "lines", points: countsIn(l.points, start, buckets), color: "c1", fill: true }))} start={start} end={end} format={digits}
      marks={marks.data?.marks ?? []} height={90} bars={step} empty="No lines in this time."
    />
  );
}

function Lines({ query }: { query: string }) {
  const q = place.value.query;
  const window = windowOf(q).ms, fixed = endOf(q);
  // The same bounds while nothing changes: a new line must not move what is read.
  const bounds = useMemo(() => range(place.peek().query), [query, window, fixed]);
  const answer = useData<Streams>(rangeURL(query, bounds.start, bounds.end, { limit: String(pageLimit), direction: "backward" }), false);
  const [older, setOlder] = useState<Entry[]>([]);
  const [reading, setReading] = useState(false);
  const [done, setDone] = useState(false);
  const newest = useMemo(() => (answer.data ? linesOf(answer.data.data.result, true) : []), [answer.data]);
  useEffect(() => {
    setOlder([]);
    setDone(false);
  }, [answer.data]);
  const all = older.length > 0 ? [...newest, ...older] : newest;
  const more = async () => {
    const last = all.at(-1);
    if (!last || reading) return;
    setReading(true);
    try {
      const page = await get<Streams>(`${loki}query_range?${new URLSearchParams({ query, start: `${bounds.start}000000`, end: last.time, limit: String(pageLimit), direction: "backward" })}`);
      const lines = linesOf(page.data.result, true);
      setOlder([...older, ...lines]);
      setDone(lines.length < pageLimit);
    } catch {
      setDone(true);
    } finally {
      setReading(false);
    }
  };
  return (
    <>
      <Panel><Volume query={query} start={bounds.start} end={bounds.end} /></Panel>
      <Panel
        title={answer.data ? `${count(all.length, "line", "lines")}${newest.length === pageLimit && !done ? ", the newest" : ""}` : "Lines"}
        actions={all.length > 0 && <Export name="logs" json={() => all.map((l) => ({ time: l.time, labels: l.labels, line: l.line }))} rows={() => [["time", "namespace", "workload", "pod", "container", "line"], ...all.map((l) => [new Date(l.at).toISOString(), l.labels.namespace ?? "", l.labels.workload ?? "", l.labels.pod ?? "", l.labels.container ?? "", l.line])]} />}
      >
        <Waiting of={answer}>
          {() => all.length === 0 ? (
            <Empty title="No lines match in this time" icon="logs"><p>Choose a longer time, or fewer conditions. Logs of deleted pods and earlier containers are here, too.</p></Empty>
          ) : (
            <>
              <List lines={all} query={query} />
              {newest.length === pageLimit && !done && all.length < most && <p class="more"><button type="button" disabled={reading} onClick={() => void more()}>{reading ? "Reading…" : `${pageLimit} older lines`}</button></p>}
            </>
          )}
        </Waiting>
      </Panel>
    </>
  );
}

/** The words that a query looks for, to mark them. */
function findOf(query: string): string {
  const m = [...query.matchAll(/\|=\s*("(?:[^"\\]|\\.)*"|`[^`]*`)/g)].at(-1);
  if (!m) return "";
  try {
    return m[1]!.startsWith("`") ? m[1]!.slice(1, -1) : (JSON.parse(m[1]!) as string);
  } catch {
    return "";
  }
}

function List({ lines, query }: { lines: Entry[]; query: string }) {
  const q = place.value.query;
  const wrap = q.get("wrap") === "1", group = q.get("group") === "1";
  const [open, setOpen] = useState("");
  const find = findOf(query);
  const groups = useMemo(() => (group ? groupLines(lines) : lines.map((first) => ({ first, last: first, count: 1 }))), [lines, group]);
  return (
    <div class={`log ${groups.length > 200 ? "long" : ""}`} role="list" aria-label="Lines, the newest first" tabIndex={0}>
      {groups.map(({ first: l, last, count: n }, i) => {
        const id = `${l.time}/${i}`;
        return (
          <div role="listitem" key={id}>
            <LogLine at={l.at} labels={l.labels} line={l.line} find={find} repeated={n} since={last.at} wrap={wrap} open={open === id} onOpen={() => setOpen(open === id ? "" : id)} />
            {open === id && <LineDetails line={l} />}
          </div>
        );
      })}
    </div>
  );
}

interface Context {
  before: { time: string; line: string; access?: Access }[];
  after: { time: string; line: string; access?: Access }[];
}

/** A line with its fields, and what the same container wrote before and after it. */
function LineDetails({ line: l }: { line: Entry }) {
  const p = parseLine(l.line);
  const [n, setN] = useState(5);
  const stream = Object.fromEntries(["job", "namespace", "pod", "container", "node", "workload", "stream"].filter((k) => l.labels[k]).map((k) => [k, l.labels[k]!]));
  const answer = useData<Context>(api("line", new URLSearchParams({ labels: JSON.stringify(stream), at: l.time, n: String(n) })), false);
  const own = answer.data?.after.find((x) => x.time === l.time && x.line === l.line);
  const after = (answer.data?.after ?? []).filter((x) => x !== own);
  const access = own?.access;
  return (
    <div class="line-details">
      <LineLinks namespace={l.labels.namespace ?? ""} workload={l.labels.workload ?? ""} pod={l.labels.pod ?? ""} container={l.labels.container ?? ""} at={l.at}>
        {p.requestId && <Link to={["request", p.requestId]} query={{ at: new Date(l.at).toISOString() }} class="strong">All of this request</Link>}
        {p.traceId && !p.requestId && <Link to={["request", p.traceId]} class="strong">All of this trace</Link>}
      </LineLinks>
      {access ? (
        <dl class="facts small">
          {Object.entries(access).filter(([, v]) => v !== "" && v !== undefined).map(([k, v]) => <><dt key={k}>{fieldWords[k] ?? k}</dt><dd>{String(k === "received" || k === "sent" ? bytes(Number(v)) : k === "duration" ? `${v} ms` : v)}</dd></>)}
        </dl>
      ) : p.fields.length > 0 ? (
        <dl class="facts small">
          <dt>message</dt><dd>{p.message}</dd>
          {p.fields.map(([k, v]) => <><dt key={k}>{k}</dt><dd>{v}</dd></>)}
        </dl>
      ) : (
        <pre>{l.line}</pre>
      )}
      <p class="labels">{Object.entries(l.labels).map(([k, v]) => <small key={k} class="pair"><i>{k}</i>={v}</small>)}</p>
      {answer.data && (
        <>
          <h4>In the same container</h4>
          <pre class="context">
            {answer.data.before.map((x, i) => <span key={i}>{clockMs(Number(x.time.slice(0, -6)))} {x.line}{"\n"}</span>)}
            <b>{clockMs(l.at)} {l.line}{"\n"}</b>
            {after.map((x, i) => <span key={i}>{clockMs(Number(x.time.slice(0, -6)))} {x.line}{"\n"}</span>)}
          </pre>
          {n < 100 && <p><button type="button" onClick={() => setN(n * 4)}>More around it</button></p>}
        </>
      )}
    </div>
  );
}

const fieldWords: Record<string, string> = {
  userAgent: "user agent", requestId: "request id", traceId: "trace id", upstreamHost: "upstream", upstreamCluster: "cluster", upstreamLocal: "own address to it", serviceTime: "service time",
  forwardedFor: "forwarded for", serverName: "server name", meaning: "what it means",
};

/** New lines as they are written. */
function Tail({ query }: { query: string }) {
  const [lines, setLines] = useState<Entry[]>([]);
  const [state, setState] = useState<"connecting" | "on" | "lost">("connecting");
  const [dropped, setDropped] = useState(0);
  const [held, setHeld] = useState(false);
  const waiting = useRef<Entry[]>([]), paused = useRef(false);
  paused.current = held;
  useEffect(() => {
    let socket: WebSocket | undefined, again = 0, ended = false, tries = 0;
    const connect = () => {
      socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${loki}tail?${new URLSearchParams({ query, limit: "100" })}`);
      socket.onopen = () => {
        tries = 0;
        setState("on");
      };
      socket.onmessage = (e) => {
        try {
          const message = JSON.parse(String(e.data)) as { streams?: LokiStream[]; dropped_entries?: unknown[] };
          waiting.current.push(...linesOf(message.streams ?? [], false));
          if (message.dropped_entries?.length) setDropped((n) => n + message.dropped_entries!.length);
        } catch {
          // not a message of the tail
        }
      };
      socket.onclose = () => {
        if (ended) return;
        setState("lost");
        again = window.setTimeout(connect, Math.min(30_000, 1000 * 2 ** tries++));
      };
    };
    connect();
    const timer = setInterval(() => {
      if (paused.current || waiting.current.length === 0) return;
      const fresh = waiting.current.splice(0).sort((a, b) => compareTimes(b.time, a.time));
      setLines((before) => [...fresh, ...before].slice(0, 1000));
    }, 250);
    return () => {
      ended = true;
      clearTimeout(again);
      clearInterval(timer);
      socket?.close();
      waiting.current = [];
    };
  }, [query]);
  return (
    <Panel
      title={{ connecting: "Connecting", on: "New lines", lost: "Connecting again" }[state]}
      actions={<>{dropped > 0 && <span class="muted">{dropped} lines were left off: too many at a time</span>}<button type="button" aria-pressed={held} onClick={() => setHeld(!held)}>{held ? "Go on" : "Hold"}</button></>}
    >
      {lines.length === 0 ? <Empty title="Waiting for lines" icon="logs"><p>What is written from now on appears here.</p></Empty> : <List lines={lines} query={query} />}
    </Panel>
  );
}

/** A query for numbers. */
function MetricLogs({ query }: { query: string }) {
  const q = place.value.query;
  const bounds = useMemo(() => range(place.peek().query), [query, windowOf(q).ms, endOf(q)]);
  const step = Math.max(15, Math.ceil((bounds.end - bounds.start) / 1000 / 120));
  const answer = useData<Matrix>(rangeURL(query, bounds.start, bounds.end, { step: `${step}s` }), false);
  return (
    <Panel>
      <Waiting of={answer}>
        {(d) => {
          const lines = seriesLines(d).map((l) => ({ ...l, labels: { name: Object.entries(l.labels ?? {}).map(([k, v]) => `${k}=${v}`).join(" ") || "value" } }));
          return <Chart title={query} series={seriesOf(lines.slice(0, 40), "name", {})} start={bounds.start} end={bounds.end} format={digits} height={280} />;
        }}
      </Waiting>
    </Panel>
  );
}

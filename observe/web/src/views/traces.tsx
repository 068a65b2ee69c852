import { useMemo, useState } from "preact/hooks";
import { api, type TraceAnswer, type TraceSummary, useData } from "../api";
import { clockMs, count, ms, percent, when } from "../format";
import { Icon } from "../icons";
import { hue } from "../hue";
import { go, now, place, set } from "../state";
import { Badge, type Column, Empty, Export, Flag, Link, Panel, Stat, Table, Text, ViewLink, Waiting } from "../ui";
import { placeOf, timeParam, timeQuery } from "../url";
import { type Compared, compareTraces, shortName } from "../waterfall";

interface Found {
  start: number;
  end: number;
  traces: TraceSummary[];
  services: string[];
}

const filters = ["service", "operation", "path", "status", "min", "max", "slowest"];

export function TracesView() {
  const q = place.value.query;
  const query = timeQuery(q);
  for (const name of filters) if (q.get(name)) query.set(name, q.get(name)!);
  for (const tag of (q.get("tags") ?? "").split(/\s+/).filter((t) => t.includes("="))) query.append("tag", tag);
  query.set("limit", "100");
  const answer = useData<Found>(api("traces", query));
  const first = q.get("a") ?? "";
  const longest = Math.max(1, ...(answer.data?.traces ?? []).map((t) => t.duration));
  const columns: Column<TraceSummary>[] = [
    { key: "start", title: "Time", value: (t) => t.start, cell: (t) => clockMs(t.start / 1000) },
    {
      key: "request", title: "Request", class: "wide", value: (t) => t.path ?? t.name, cell: (t) => (
        <span class="end"><Link to={["request", t.requestId ?? t.id]} query={{ at: timeParam(t.start / 1000) }}><code>{t.path ? `${t.method ?? ""} ${t.path}` : t.name}</code></Link><small title={t.service}>{t.service.split(".")[0]}</small></span>
      ),
    },
    { key: "duration", title: "Duration", number: true, value: (t) => t.duration, cell: (t) => <span class={`duration ${t.errors > 0 ? "bad" : ""}`}><i style={{ inlineSize: `${(t.duration / longest) * 100}%` }} aria-hidden="true" /><span>{ms(t.duration / 1000)}</span></span> },
    { key: "errors", title: "Errors", number: true, value: (t) => t.errors, cell: (t) => (t.errors > 0 ? <Badge level="bad">{t.errors}</Badge> : <span class="muted">0</span>) },
    { key: "code", title: "Code", value: (t) => t.code ?? "" },
    { key: "spans", title: "Spans", number: true, value: (t) => t.spans, cell: (t) => (arriving(t) ? <>{t.spans} <small class="muted">so far</small></> : t.spans) },
    { key: "services", title: "Services", class: "wide", value: (t) => t.services.length, cell: (t) => <Services list={t.services} /> },
    {
      key: "compare", title: "Compare", value: () => "", cell: (t) => (
        t.id === first ? <button type="button" aria-pressed="true" onClick={() => set({ a: undefined })}>Chosen</button>
          : <button type="button" onClick={() => (first ? go(placeOf(place.peek(), ["compare", first, t.id])) : set({ a: t.id }))}>{first ? "Compare with it" : "Choose"}</button>
      ),
    },
  ];
  return (
    <>
      <div class="head">
        <h1>Traces</h1>
        <div class="tools">
          <Flag name="slowest">Slowest first</Flag>
          {answer.data && <Export name="traces" json={() => answer.data!.traces} rows={() => [["time", "id", "request id", "method", "path", "code", "duration ms", "spans", "errors"], ...answer.data!.traces.map((t) => [new Date(t.start / 1000).toISOString(), t.id, t.requestId ?? "", t.method ?? "", t.path ?? "", t.code ?? "", t.duration / 1000, t.spans, t.errors])]} />}
        </div>
      </div>
      <div class="filters">
        <Text name="path" label="Path" placeholder="/orders" />
        <Text name="service" label="Service" placeholder="any" list="services" />
        <Text name="status" label="Status" placeholder="error, 503, 5xx" list="statuses" />
        <Text name="min" label="Longer than, ms" type="number" width="narrow" />
        <Text name="max" label="Shorter than, ms" type="number" width="narrow" />
        <Text name="operation" label="Operation" />
        <Text name="tags" label="Tags" placeholder="name=value" />
        <datalist id="services">{answer.data?.services.map((s) => <option key={s} value={s} />)}</datalist>
        <datalist id="statuses">{["error", "ok", "5xx", "4xx", "503", "404"].map((s) => <option key={s} value={s} />)}</datalist>
      </div>
      {first && <p class="chips"><span class="chip">Choose a second trace to compare with <code>{first.slice(0, 8)}…</code><button type="button" aria-label="Do not compare" onClick={() => set({ a: undefined })}><Icon name="close" size={10} /></button></span></p>}
      <Panel>
        <Waiting of={answer}>
          {(d) => d.traces.length === 0 ? (
            <Empty title="No traces match in this time" icon="traces">
              <p>{d.services.length === 0 ? "No service has sent spans in this time. A request can still be found by its x-request-id: every proxy logs it." : "Choose a longer time, or fewer conditions."}</p>
            </Empty>
          ) : (
            <>
              <Scatter traces={d.traces} start={d.start} end={d.end} />
              <Table columns={columns} rows={d.traces} caption="Traces" id={(t) => t.id} sorted={q.get("slowest") === "1" ? "-duration" : "-start"} rowClass={(t) => (t.errors > 0 ? "bad" : "")} />
            </>
          )}
        </Waiting>
      </Panel>
    </>
  );
}

/** Whether spans of a trace may still be on their way: proxies and SDKs send them every five seconds. */
const arriving = (t: TraceSummary): boolean => (t.start + t.duration) / 1000 > now() - 15_000;

/** The services of a trace, proxies and apps of one name together. */
function Services({ list }: { list: TraceSummary["services"] }) {
  const merged = new Map<string, { spans: number; errors: number }>();
  for (const s of list) {
    const name = s.name.split(".")[0]!, m = merged.get(name) ?? { spans: 0, errors: 0 };
    merged.set(name, { spans: m.spans + s.spans, errors: m.errors + s.errors });
  }
  const all = [...merged];
  return <span class="services">{all.slice(0, 4).map(([name, s]) => <span key={name} class={`w${hue(name)}`}>{s.errors > 0 && <Icon name="bad" size={11} label="with errors" />}{name}</span>)}{all.length > 4 && <small>{all.length - 4} more</small>}</span>;
}

/** Each trace as a point in time and duration. The table below has the same for who cannot see it. */
function Scatter({ traces, start, end }: { traces: TraceSummary[]; start: number; end: number }) {
  const top = Math.max(...traces.map((t) => t.duration)), low = Math.max(1, Math.min(...traces.map((t) => t.duration)));
  const y = (d: number) => 66 - (top > low ? ((Math.log(Math.max(d, 1)) - Math.log(low)) / (Math.log(top) - Math.log(low))) * 58 : 29);
  return (
    <figure class="scatter" aria-hidden="true">
      <figcaption><span>{ms(top / 1000)}</span>{top > low && <span>{ms(low / 1000)}</span>}</figcaption>
      <div>
        <svg viewBox="0 0 1000 74" preserveAspectRatio="none"><path d="M0 73.5H1000" /></svg>
        {traces.map((t) => (
          <a key={t.id} tabIndex={-1} href={placeOf(place.value, ["request", t.requestId ?? t.id], { at: timeParam(t.start / 1000) })} class={t.errors > 0 ? "bad" : ""} title={`${clockMs(t.start / 1000)} ${t.path ?? t.name} ${ms(t.duration / 1000)}`} style={{ insetInlineStart: `${(((t.start / 1000 - start) / (end - start)) * 100).toFixed(2)}%`, insetBlockStart: `${y(t.duration)}px` }} />
        ))}
      </div>
    </figure>
  );
}

export function CompareView() {
  const [, a = "", b = ""] = place.value.path;
  const left = useData<TraceAnswer>(api(`trace/${encodeURIComponent(a)}`), false), right = useData<TraceAnswer>(api(`trace/${encodeURIComponent(b)}`), false);
  const rows = useMemo(() => (left.data && right.data ? compareTraces(left.data.bars, right.data.bars) : []), [left.data, right.data]);
  const [all, setAll] = useState(true);
  return (
    <>
      <nav class="crumbs" aria-label="Path"><ViewLink view="traces">Traces</ViewLink></nav>
      <div class="head"><h1>Two traces</h1><div class="tools"><Link class="button" to={["compare", b, a]}>Swap</Link></div></div>
      <Waiting of={left}>{() => null}</Waiting>
      <Waiting of={right}>{() => null}</Waiting>
      {left.data && right.data && (
        <>
          <div class="columns">
            <Sum name="A" of={left.data} /><Sum name="B" of={right.data} />
          </div>
          <Panel title="What differs" actions={<label class="flag"><input type="checkbox" checked={!all} onChange={(e) => setAll(!e.currentTarget.checked)} />Only what differs by more than a fifth</label>}>
            <Differences rows={all ? rows : rows.filter(differs)} longest={Math.max(1, ...rows.flatMap((r) => [r.a?.duration ?? 0, r.b?.duration ?? 0]))} />
          </Panel>
        </>
      )}
    </>
  );
}

const differs = (r: Compared): boolean => !r.a || !r.b || !!r.a.error !== !!r.b.error || Math.abs(r.a.duration - r.b.duration) > 0.2 * Math.max(r.a.duration, r.b.duration);

function Sum({ name, of: t }: { name: string; of: TraceAnswer }) {
  return (
    <Panel title={<>{name} <Link to={["request", t.requestId ?? t.id]} query={{ at: timeParam(t.start / 1000) }}><code>{t.path ? `${t.method ?? ""} ${t.path}` : t.name}</code></Link></>}>
      <dl class="stats inner">
        <Stat label="Duration" value={ms(t.duration / 1000)} hint={when(t.start / 1000, now(), true)} />
        <Stat label="Spans" value={t.spans} hint={count(t.services.length, "service", "services")} />
        <Stat label="Errors" value={t.errors} level={t.errors > 0 ? "bad" : undefined} hint={t.code ? `code ${t.code}` : undefined} />
      </dl>
    </Panel>
  );
}

function Differences({ rows, longest }: { rows: Compared[]; longest: number }) {
  if (rows.length === 0) return <p class="muted">Nothing differs by more than a fifth.</p>;
  const bar = (span: Compared["a"], name: string) => (
    <td data-label={name}>{span ? <span class={`duration ${span.error ? "bad" : ""}`}><i style={{ inlineSize: `${(span.duration / longest) * 100}%` }} aria-hidden="true" /><span>{ms(span.duration / 1000)}{span.error && <Icon name="bad" size={11} label="error" />}</span></span> : <span class="muted">not there</span>}</td>
  );
  return (
    <div class="table" tabIndex={0} role="region" aria-label="Spans of both traces">
      <table class="compare">
        <caption class="unseen">Spans of both traces, side by side</caption>
        <thead><tr><th scope="col">Service and operation</th><th scope="col">A</th><th scope="col">B</th><th scope="col" class="number">Difference</th></tr></thead>
        <tbody>
          {rows.slice(0, 1000).map((r) => (
            <tr key={r.key}>
              <th scope="row" style={{ paddingInlineStart: `${8 + Math.min(r.depth, 20) * 12}px` }}><b class={`w${hue(r.service.split(".")[0]!)}`}>{r.service.split(".")[0]}</b> <span title={r.name}>{shortName(r.name)}</span></th>
              {bar(r.a, "A")}{bar(r.b, "B")}
              <td class="number" data-label="Difference"><Difference of={r} /></td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Difference({ of: r }: { of: Compared }) {
  if (!r.a) return <Badge level="warn" icon="plus">only in B</Badge>;
  if (!r.b) return <Badge level="warn" icon="minus">only in A</Badge>;
  const d = r.b.duration - r.a.duration;
  if (Math.abs(d) < 50) return <span class="muted">same</span>;
  const text = `${d > 0 ? "+" : "−"}${ms(Math.abs(d) / 1000)}`;
  const share = r.a.duration > 0 ? ` (${d > 0 ? "+" : "−"}${percent(Math.abs(d) / r.a.duration)})` : "";
  return <span class={differs(r) ? (d > 0 ? "slower" : "faster") : "muted"}>{text}{share}</span>;
}

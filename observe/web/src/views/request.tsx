import type { ComponentChildren } from "preact";
import { useMemo, useRef, useState } from "preact/hooks";
import { api, type RequestAnswer, type RequestLine, useData } from "../api";
import { clockMs, count, ms, when } from "../format";
import { Icon } from "../icons";
import { hue } from "../hue";
import { LogLine } from "../logline";
import { now, place, set } from "../state";
import { Badge, Choice, Copy, Empty, Export, Link, Panel, Stat, ViewLink, Waiting } from "../ui";
import { type Change, endOf } from "../url";
import { type NamedValue, type Row, shortName, type Span, ticks, waterfall } from "../waterfall";

export function RequestView() {
  const [, id = ""] = place.value.path;
  const q = place.value.query;
  const query = new URLSearchParams();
  // From where the id was found, the time is known; without it a day before the end of what is shown.
  const at = q.get("at") ? Date.parse(q.get("at")!) : NaN;
  if (Number.isFinite(at)) {
    query.set("end", String(at + 15 * 60_000));
    query.set("window", "30m");
  } else {
    const end = endOf(q);
    if (end !== undefined) query.set("end", String(end));
    query.set("window", q.get("far") === "1" ? "7d" : "1d");
  }
  const answer = useData<RequestAnswer>(api(`request/${encodeURIComponent(id)}`, query), false);
  return (
    <>
      <nav class="crumbs" aria-label="Path"><ViewLink view="traces">Traces</ViewLink></nav>
      <div class="head">
        <h1 class="id">Request <code>{id}</code><Copy text={id} label="Copy the id" /></h1>
        {answer.data && <div class="tools"><Compare traces={answer.data.traces} /><Export name={`request-${id}`} json={() => answer.data} rows={() => lineRows(answer.data!.lines)} /></div>}
      </div>
      <Waiting of={answer}>{(d) => <Body data={d} />}</Waiting>
      {answer.error?.status === 404 && (
        <Empty title="Nothing was recorded about this id" icon="search">
          <p>Ids are looked for in the spans, in the proxies' access logs and in what apps log.</p>
          {q.get("far") !== "1" && <p><button type="button" onClick={() => set({ far: "1", at: undefined })}>Look through the last seven days</button></p>}
        </Empty>
      )}
    </>
  );
}

/** A link to choose a second trace. */
function Compare({ traces }: { traces: string[] }) {
  return traces[0] ? <Link to={["traces"]} query={{ a: traces[0] }} class="button">Compare</Link> : null;
}

function Body({ data: d }: { data: RequestAnswer }) {
  const q = place.value.query;
  const selected = q.get("span") ?? "";
  const show = q.get("lines") === "proxy" ? "proxy" : q.get("lines") === "app" ? "app" : "all";
  const flow = useMemo(() => waterfall(d.bars), [d]);
  const services = new Set(d.bars.map((b) => b.service.split(".")[0]));
  const errors = d.bars.filter((b) => b.error).length;
  const span = d.bars.find((b) => b.id === selected);
  const lines = d.lines.filter((l) => (show === "all" || (show === "proxy") === (l.container === "istio-proxy")) && (!span || l.bar === span.id)).sort((a, b) => momentOf(a) - momentOf(b));
  const first = d.lines.flatMap((l) => (l.access?.start ? [l.access] : [])).sort((a, b) => Date.parse(a.start!) - Date.parse(b.start!) || b.duration - a.duration)[0];
  return (
    <>
      <dl class="stats">
        {first && <Stat label="Request" value={<code>{first.method} {first.path}</code>} hint={first.authority} />}
        {flow.duration > 0 && <Stat label="Duration" value={ms(flow.duration / 1000)} hint={flow.start > 0 ? when(flow.start / 1000, now(), true) : undefined} />}
        <Stat label={d.fromLogs ? "Hops" : "Spans"} value={d.bars.length} hint={count(services.size, "service", "services")} />
        <Stat label="Errors" value={errors} level={errors > 0 ? "bad" : undefined} hint={errors > 0 ? "see below" : "none"} />
        <Stat label="Lines" value={d.lines.length} hint={d.more ? "and more" : "in all logs"} />
      </dl>
      <Panel title="Where the time went" actions={d.fromLogs && d.bars.length > 0 ? <span class="muted">from the proxies' access logs, to the millisecond: there are no spans</span> : undefined}>
        {d.incomplete && <p><Badge level="warn">{d.incomplete}</Badge></p>}
        {d.bars.length > 0 ? <Waterfall spans={d.bars} lines={d.lines} selected={selected} onSelect={(id) => set({ span: id === selected ? undefined : id }, true)} /> : <Empty title="No spans, and no access log" icon="traces"><p>Only apps have logged this id.</p></Empty>}
        {span && <Details span={span} />}
      </Panel>
      <Panel
        title={span ? "Lines during the chosen part" : "What was logged"}
        actions={<Choice label="Lines" value={show} onChange={(v) => set({ lines: v === "all" ? undefined : v }, true)} options={[{ value: "all", text: "All" }, { value: "app", text: "Apps" }, { value: "proxy", text: "Proxies" }]} />}
      >
        {lines.length === 0 ? <p class="muted">No line{span ? " during this part" : " has this id"}.</p> : (
          <div class="log" role="list" aria-label="Lines">
            {lines.map((l, i) => <RequestLineView key={i} line={l} bar={d.bars.find((b) => b.id === l.bar)} />)}
          </div>
        )}
      </Panel>
    </>
  );
}

function RequestLineView({ line: l, bar }: { line: RequestLine; bar: Span | undefined }) {
  const [open, setOpen] = useState(false);
  return (
    <div role="listitem">
      <LogLine at={momentOf(l) / 1000} labels={{ namespace: l.namespace, workload: l.workload, pod: l.pod, container: l.container }} line={l.line} open={open} onOpen={() => setOpen(!open)} />
      {open && (
        <div class="line-details">
          <pre>{l.line}</pre>
          {bar && <p><button type="button" class="link" onClick={() => set({ span: bar.id }, true)}>Part of {bar.service}: {bar.name}</button></p>}
          <LineLinks namespace={l.namespace} workload={l.workload} pod={l.pod} container={l.container} at={l.time / 1000} />
        </div>
      )}
    </div>
  );
}

export function LineLinks({ namespace, workload, pod, container, at, children }: { namespace: string; workload: string; pod: string; container: string; at: number; children?: ComponentChildren }) {
  const time = new Date(Math.ceil(at / 1000) * 1000 + 60_000).toISOString().replace(".000Z", "Z");
  const here = (matchers: Record<string, string>): Change => ({ q: `{job="pods", ${Object.entries(matchers).filter(([, v]) => v).map(([k, v]) => `${k}=${JSON.stringify(v)}`).join(", ")}}`, t: time, w: "5m" });
  return (
    <p class="links">
      {children}
      {pod && <Link to={["logs"]} query={here({ namespace, pod, container })}>This container's log at that time</Link>}
      {workload && namespace && <Link to={["logs"]} query={here({ namespace, workload })}>The workload's log</Link>}
      {workload && namespace && <Link to={["workloads", namespace, workload]}>Workload</Link>}
    </p>
  );
}

/** When what a line is about happened, in microseconds. A proxy writes its line later, when it has time. */
function momentOf(l: RequestLine): number {
  const begin = l.access?.start ? Date.parse(l.access.start) : NaN;
  return Number.isFinite(begin) ? (begin + l.access!.duration) * 1000 : l.time;
}

/** The service of a span without its namespace: proxies and apps of one name alike. */
const serviceOf = (s: Span): string => s.service.split(".")[0]!;

export function Waterfall({ spans, lines, selected, onSelect }: { spans: Span[]; lines: RequestLine[]; selected: string; onSelect: (id: string) => void }) {
  const [closed, setClosed] = useState<ReadonlySet<string>>(new Set());
  const [critical, setCritical] = useState(false);
  const flow = useMemo(() => waterfall(spans, closed), [spans, closed]);
  const box = useRef<HTMLDivElement>(null);
  const at = new Map<string, RequestLine[]>();
  for (const l of lines) {
    if (!l.bar) continue;
    const list = at.get(l.bar);
    if (list) list.push(l);
    else at.set(l.bar, [l]);
  }
  const shown = flow.rows.slice(0, 2000);
  const toggle = (id: string) => {
    const next = new Set(closed);
    if (!next.delete(id)) next.add(id);
    setClosed(next);
  };
  const focusRow = (i: number) => box.current?.querySelectorAll<HTMLElement>("[role=row][tabindex]")[i]?.focus();
  const current = Math.max(0, shown.findIndex((r) => r.span.id === selected));
  return (
    <>
      <div class="waterfall" role="treegrid" aria-label="Parts of the request" aria-rowcount={flow.rows.length} ref={box}>
        <div class="ruler" role="row">
          <span role="columnheader">Service and operation</span>
          <span role="columnheader" class="scale"><span class="unseen">Time</span>{ticks(flow.duration).map((t) => <i key={t} style={{ insetInlineStart: `${(t / flow.duration) * 100}%` }}>{ms(t / 1000)}</i>)}</span>
          <span role="columnheader" class="took">Duration</span>
        </div>
        {shown.map((r, i) => (
          <RowView
            key={r.span.id} row={r} lines={at.get(r.span.id) ?? []} open={!closed.has(r.span.id)} selected={r.span.id === selected} start={flow.start} duration={flow.duration} dimmed={critical && !r.critical} tab={i === current ? 0 : -1}
            onSelect={() => onSelect(r.span.id)} onToggle={() => toggle(r.span.id)}
            onKey={(e) => {
              switch (e.key) {
                case "ArrowDown": focusRow(i + 1); break;
                case "ArrowUp": focusRow(i - 1); break;
                case "ArrowRight": if (r.children > 0 && closed.has(r.span.id)) toggle(r.span.id); else focusRow(i + 1); break;
                case "ArrowLeft": if (r.children > 0 && !closed.has(r.span.id)) toggle(r.span.id); else focusRow(shown.findIndex((x) => x.span.id === r.span.parent)); break;
                case "Home": focusRow(0); break;
                case "End": focusRow(shown.length - 1); break;
                case "Enter": case " ": onSelect(r.span.id); break;
                default: return;
              }
              e.preventDefault();
            }}
          />
        ))}
      </div>
      <p class="foot muted">
        <label class="flag"><input type="checkbox" checked={critical} onChange={(e) => setCritical(e.currentTarget.checked)} />Only the critical path</label>
        {flow.moved > 0 && <span>{count(flow.moved, "part was", "parts were")} moved into the one around: the clocks of the nodes differ.</span>}
        {flow.rows.length > shown.length && <span>The first {shown.length} of {flow.rows.length} parts are shown.</span>}
      </p>
    </>
  );
}

function RowView({ row: r, lines, open, selected, start, duration, dimmed, tab, onSelect, onToggle, onKey }: {
  row: Row; lines: RequestLine[]; open: boolean; selected: boolean; start: number; duration: number; dimmed: boolean; tab: number; onSelect: () => void; onToggle: () => void; onKey: (e: KeyboardEvent) => void;
}) {
  const s = r.span;
  const inside = lines.map((l) => ({ l, x: (momentOf(l) - start) / duration })).filter(({ x }) => x >= 0 && x <= 1.02);
  return (
    <div
      role="row" tabIndex={tab} class={`row ${selected ? "selected" : ""} ${dimmed ? "dimmed" : ""} ${s.error ? "bad" : ""}`} aria-level={r.depth + 1} aria-expanded={r.children > 0 ? open : undefined} aria-selected={selected}
      onKeyDown={onKey} onClick={onSelect}
    >
      <span role="gridcell" class="what" style={{ paddingInlineStart: `${Math.min(r.depth, 24) * 14 + 4}px` }}>
        {r.children > 0 ? <button type="button" tabIndex={-1} class="twist" aria-label={open ? "Close" : "Open"} onClick={(e) => { e.stopPropagation(); onToggle(); }}><Icon name={open ? "down" : "right"} size={10} /></button> : <i class="twist" />}
        <b class={`w${hue(serviceOf(s))}`}>{serviceOf(s)}</b>
        {s.proxy && <small class="tag">proxy</small>}
        <span title={s.name}>{shortName(s.name)}</span>
        {s.error && <Icon name="bad" size={12} label="error" />}
        {r.orphan && <Icon name="warn" size={12} label="its parent was not recorded" />}
      </span>
      <span role="gridcell" class="bars">
        <i class={`bar b${hue(serviceOf(s))} ${s.proxy ? "proxy" : ""} ${s.error ? "bad" : ""}`} style={{ insetInlineStart: `${r.left * 100}%`, inlineSize: `max(2px, ${r.width * 100}%)` }} />
        {inside.map(({ l, x }, i) => <i key={i} class="tick" title={`${clockMs(l.time / 1000)} ${l.line.slice(0, 200)}`} style={{ insetInlineStart: `${Math.min(1, x) * 100}%` }} />)}
      </span>
      <span role="gridcell" class="took">{ms(s.duration / 1000)}{r.moved && <Icon name="clock" size={11} label="moved: clocks differ" />}{lines.length > 0 && <small class="unseen">, {count(lines.length, "line", "lines")}</small>}</span>
    </div>
  );
}

function Details({ span: s }: { span: Span }) {
  return (
    <div class="span-details">
      <h3>{s.service}: {s.name}</h3>
      <dl class="facts">
        <dt>Kind</dt><dd>{s.kind || "internal"}{s.proxy && ", of the proxy"}</dd>
        <dt>Began</dt><dd>{clockMs(s.start / 1000)}</dd>
        <dt>Took</dt><dd>{ms(s.duration / 1000)}</dd>
        {s.message && <><dt>Said</dt><dd>{s.message}</dd></>}
        {s.pod && <><dt>Pod</dt><dd>{s.pod}{s.namespace && `, ${s.namespace}`}</dd></>}
        {s.warnings?.map((w) => <><dt>Note</dt><dd>{w}</dd></>)}
      </dl>
      <Values title="Attributes" list={s.attributes} />
      <Values title="Process" list={s.resource} />
      {s.events && s.events.length > 0 && (
        <>
          <h4>Events</h4>
          <ul class="events">{s.events.map((e, i) => <li key={i}><time>{clockMs(e.time / 1000)}</time> {e.name} {e.attributes?.map((a) => <small key={a.name} class="pair"><i>{a.name}</i>={a.value}</small>)}</li>)}</ul>
        </>
      )}
    </div>
  );
}

function Values({ title, list }: { title: string; list: NamedValue[] | undefined }) {
  if (!list || list.length === 0) return null;
  return (
    <>
      <h4>{title}</h4>
      <dl class="facts small">{list.map((v) => <><dt key={v.name}>{v.name}</dt><dd>{v.value}</dd></>)}</dl>
    </>
  );
}

function lineRows(lines: RequestLine[]): (string | number)[][] {
  return [["time", "namespace", "workload", "pod", "container", "line"], ...lines.map((l) => [new Date(l.time / 1000).toISOString(), l.namespace, l.workload, l.pod, l.container, l.line])];
}


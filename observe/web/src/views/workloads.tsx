import { api, type Container, type Line, type Mark, type Nearest, type Pod, useData, type WorkloadAnswer, type WorkloadRow } from "../api";
import { Chart, classStyles, palette, quantileStyles, type Series, seriesOf } from "../chart";
import { bytes, capital, count, digits, ms, percent, rate, sentence, span, when } from "../format";
import { Icon } from "../icons";
import { beforeEnd } from "../logs";
import { numbered, revisionTimes } from "../since";
import { now, place } from "../state";
import { Badge, type Column, Empty, Errors, Export, Flag, Link, Meter, Panel, Prose, SinceTime, Stat, Table, Text, Time, ViewLink, Waiting } from "../ui";
import { timeQuery } from "../url";
import { amounts, sumOf, usedBy } from "../usage";
import { EventList } from "./events";
import { Changes } from "./overview";
import { phaseLevel } from "./rollouts";

export function WorkloadsView() {
  const q = place.value.query;
  const query = timeQuery(q);
  for (const ns of q.getAll("ns")) query.append("ns", ns);
  const answer = useData<{ workloads: WorkloadRow[] }>(api("workloads", query));
  const find = (q.get("find") ?? "").toLowerCase(), troubled = q.get("trouble") === "1";
  return (
    <>
      <div class="head">
        <h1>Workloads</h1>
        <div class="tools">
          <Text name="find" label="Find" placeholder="name or image" />
          <Flag name="trouble">Only with problems</Flag>
          {answer.data && <Export name="workloads" json={() => answer.data!.workloads} rows={() => [["namespace", "name", "kind", "ready", "replicas", "restarts", "cpu", "cpu of its limit", "of container", "memory", "memory of its limit", "of container", "requests/s", "errors/s", "images"], ...answer.data!.workloads.map((w) => [w.namespace, w.name, w.kind, w.ready, w.replicas, w.restarts, w.cpu, ...shareCells(w.cpuNearest), w.memory, ...shareCells(w.memoryNearest), w.rate, w.errors, w.images.join(" ")])]} />}
        </div>
      </div>
      <Panel>
        <Waiting of={answer}>
          {(d) => {
            const rows = d.workloads.filter((w) => (find === "" || `${w.namespace}/${w.name} ${w.images.join(" ")}`.toLowerCase().includes(find)) && (!troubled || w.problem || w.restarts >= 0.5 || (w.rate > 0 && w.errors / w.rate >= 0.01)));
            if (d.workloads.length === 0) return <Empty title="No workloads were recorded at this time" icon="workloads"><p>Snapshots of workloads are kept from the moment at which the store sees the API server.</p></Empty>;
            if (rows.length === 0) return <Empty title={troubled ? "No workload has a problem" : "Nothing here matches"} icon={troubled ? "ok" : "search"} />;
            return <Table columns={columns} rows={rows} caption="Workloads" id={(w) => JSON.stringify([w.kind, w.namespace, w.name])} sorted="namespace" rowClass={(w) => (w.problem ? "warn" : "")} />;
          }}
        </Waiting>
      </Panel>
    </>
  );
}

const columns: Column<WorkloadRow>[] = [
  { key: "name", title: "Workload", value: (w) => w.name, cell: (w) => <span class="end"><Link to={["workloads", w.namespace, w.name]}>{w.name}</Link><small>{w.kind}</small></span> },
  { key: "namespace", title: "Namespace", class: "wide", value: (w) => `${w.namespace}/${w.name}`, cell: (w) => w.namespace },
  { key: "ready", title: "Ready", number: true, value: (w) => w.ready / Math.max(1, w.replicas), cell: (w) => (w.problem ? <Badge level={w.ready === 0 ? "bad" : "warn"}>{w.ready}/{w.replicas}</Badge> : `${w.ready}/${w.replicas}`) },
  { key: "restarts", title: "Restarts", number: true, value: (w) => w.restarts, cell: (w) => (w.restarts >= 0.5 ? <Badge level="warn">{Math.round(w.restarts)}</Badge> : <span class="muted">0</span>) },
  { key: "cpu", title: "CPU", number: true, value: (w) => w.cpu, cell: (w) => <Use total={w.cpu} nearest={w.cpuNearest} format={cores} /> },
  { key: "memory", title: "Memory", number: true, value: (w) => w.memory, cell: (w) => <Use total={w.memory} nearest={w.memoryNearest} format={bytes} /> },
  { key: "rate", title: "Requests", number: true, value: (w) => w.rate, cell: (w) => (w.rate > 0 ? rate(w.rate) : w.sent > 0 ? <span class="muted" title="It receives none that a sidecar measures">sends {rate(w.sent)}</span> : <span class="muted">–</span>) },
  { key: "errors", title: "Errors", number: true, value: (w) => (w.rate > 0 ? w.errors / w.rate : -1), cell: (w) => <Errors rate={w.rate} errors={w.errors} /> },
  { key: "images", title: "Images", class: "wide", value: (w) => w.images.join(" "), cell: (w) => <span class="images">{w.images.map((i) => <code key={i}>{i}</code>)}</span> },
];

/** What all containers use together. The bar, and the words below it, are of the container that is nearest to its limit: those without one have no share. */
function Use({ total, nearest: n, format }: { total: number; nearest: Nearest | undefined; format: (v: number) => string }) {
  if (!n) return <Meter share={undefined} text={format(total)} />;
  const share = n.use / n.limit;
  return (
    <span class="end use" title={`${n.container} of ${n.pod} uses ${format(n.use)} of its limit, ${format(n.limit)}`}>
      <Meter share={share} text={format(total)} level={share > 0.9 ? "warn" : undefined} />
      <small>{n.container} {percent(share)} of limit</small>
    </span>
  );
}

const shareCells = (n: Nearest | undefined): (string | number)[] => (n ? [n.use / n.limit, n.container] : ["", ""]);

/** CPU in cores, small amounts in thousandths as Kubernetes writes them. */
export function cores(n: number): string {
  return n < 0.1 ? `${Math.round(n * 1000)}m` : digits(n);
}

export function WorkloadView() {
  const [, namespace = "", name = ""] = place.value.path;
  const q = place.value.query;
  const query = timeQuery(q);
  if (q.get("kind")) query.set("kind", q.get("kind")!);
  const answer = useData<WorkloadAnswer>(api(`workloads/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}`, query));
  const marksQuery = timeQuery(q);
  marksQuery.set("ns", namespace);
  marksQuery.set("workload", name);
  const marks = useData<{ marks: Mark[] }>(api("marks", marksQuery));
  return (
    <>
      <nav class="crumbs" aria-label="Path"><ViewLink view="workloads">Workloads</ViewLink></nav>
      <div class="head">
        <h1 class="ends"><span class="end"><span>{name}</span><small>{answer.data ? `${answer.data.state.kind}, ` : ""}{namespace}</small></span></h1>
        <div class="tools">
          <Link class="button" to={["logs"]} query={{ q: `{job="pods", namespace=${JSON.stringify(namespace)}, workload=${JSON.stringify(name)}}` }}><Icon name="logs" />Logs</Link>
          <Link class="button" to={["graph"]} query={{ focus: name, "focus-ns": namespace }}><Icon name="graph" />Graph</Link>
          <Link class="button" to={["traces"]} query={{ service: `${name}.${namespace}` }}><Icon name="traces" />Traces</Link>
          {answer.data && <Export name={`workload-${name}`} json={() => answer.data} />}
        </div>
      </div>
      <Waiting of={answer}>{(d) => <Body data={d} marks={marks.data?.marks ?? []} />}</Waiting>
      {answer.error?.status === 404 && <Empty title="Not recorded in this time" icon="workloads"><p>Choose an earlier or a longer time: workloads that are deleted stay here as long as the store keeps them.</p></Empty>}
    </>
  );
}

const dashes = [[], [6, 3], [2, 3], [10, 3, 2, 3]];

/** What each container uses, with the limits of those that have one. */
function Usage({ data: d, marks }: { data: WorkloadAnswer; marks: Mark[] }) {
  const chart = (title: string, resource: string, lines: Line[], format: (v: number) => string, binary: boolean) => {
    const series: Series[] = usedBy(lines, d.state.name).map((u) => ({ label: u.label, points: u.points, color: palette(u.pod).color, dash: dashes[u.container % dashes.length]! }));
    const limits = amounts(d.resources, resource, "limit");
    const notes = [...limits, ...amounts(d.resources, resource, "request")].map((a) => `${a.label}: ${format(a.value)}`);
    if (limits.length === 0) notes.unshift("no limit");
    if (d.pods.length > d.measured) notes.push(`the newest ${d.measured} pods`);
    return <Panel><Chart title={title} note={notes.join("; ")} series={series} start={d.start} end={d.end} format={format} binary={binary} marks={marks} limits={limits} /></Panel>;
  };
  return (
    <>
      {chart("CPU, cores by container", "cpu", d.cpu, cores, false)}
      {chart("Memory by container", "memory", d.memory, bytes, true)}
    </>
  );
}

/** The requests that a workload receives; of one that receives none, as gateways, those that it sends. */
function Requests({ data: d, marks }: { data: WorkloadAnswer; marks: Mark[] }) {
  const of = d.sends ? { note: "that it sends: the mesh measured none that it receives" } : {};
  return (
    <>
      <Panel><Chart title="Requests per second" {...of} series={seriesOf(d.rates, "class", classStyles)} start={d.start} end={d.end} format={digits} marks={marks} empty="It received no requests in the mesh." /></Panel>
      <Panel><Chart title="Duration" {...of} series={seriesOf(d.quantiles, "quantile", quantileStyles)} start={d.start} end={d.end} format={ms} marks={marks} empty="It received no requests in the mesh." /></Panel>
    </>
  );
}

/** CPU and memory that the containers of a pod request, or may use, together. */
function OfPod({ label, data: d, what }: { label: string; data: WorkloadAnswer; what: "request" | "limit" }) {
  const cpu = sumOf(d.resources, "cpu", what), memory = sumOf(d.resources, "memory", what);
  const containers = [...new Set([...cpu.containers, ...memory.containers])];
  if (containers.length === 0) return <Stat label={label} value="none" hint="CPU and memory" />;
  return <Stat label={label} value={`${cpu.value > 0 ? cores(cpu.value) : "–"} · ${memory.value > 0 ? bytes(memory.value) : "–"}`} hint={`CPU and memory, of ${containers.join(", ")}`} />;
}

function Body({ data: d, marks }: { data: WorkloadAnswer; marks: Mark[] }) {
  const s = d.state, running = d.pods.filter((p) => !p.gone);
  const restarts = running.reduce((n, p) => n + p.restarts, 0);
  // What the problem says already.
  const said = d.findings.filter((f) => d.problem && [d.problem.text, d.problem.why ?? ""].some((t) => t.includes(f.message)));
  const revisions = numbered(d.revisions), times = revisionTimes({ ...d, revisions });
  return (
    <>
      {s.deleted && <p><Badge level="note">It was deleted <Time at={Date.parse(s.deleted)} /></Badge></p>}
      {d.problem && (
        <div class="failure" role="status">
          <Icon name="warn" />
          <span><Prose text={[d.problem.text, d.problem.why ?? "", ...said.map((f) => capital(f.advice))].map(sentence).filter(Boolean).join(" ")} />{d.problem.since && <> Since <Time at={Date.parse(d.problem.since)} />.</>}</span>
        </div>
      )}
      {d.findings.filter((f) => !said.includes(f)).map((f) => <div class="failure" key={JSON.stringify(f)}><Icon name="note" /><span><b><Prose text={sentence(f.message)} /></b> <Prose text={sentence(capital(f.advice))} /></span></div>)}
      <dl class="stats">
        <Stat label="Pods ready" value={<>{s.ready}<span class="of">/{s.replicas}</span></>} level={d.problem ? (s.ready === 0 ? "bad" : "warn") : undefined} hint={count(d.pods.length, "pod in this time", "pods in this time")} />
        <Stat label="Restarts" value={restarts} level={restarts > 0 ? "warn" : undefined} hint="of these pods" />
        <OfPod label="Requests of a pod" data={d} what="request" />
        <OfPod label="Limits of a pod" data={d} what="limit" />
        {s.created && <Stat label="Age" value={span((s.deleted ? Date.parse(s.deleted) : d.end) - Date.parse(s.created))} hint={`revision ${s.revision || "–"}`} />}
      </dl>
      <div class="columns">
        <Requests data={d} marks={marks} />
        <Usage data={d} marks={marks} />
      </div>
      <Panel title="Pods, also those that are gone" actions={d.cut ? <span class="muted">the newest 5,000 snapshots of this time</span> : undefined}>
        {d.pods.length === 0 ? <Empty title="No pods" icon="workloads" /> : <Pods data={d} />}
      </Panel>
      <div class="columns">
        <Panel title="Revisions">
          <ol class="changes">
            {revisions.map((r, i) => (
              <li key={`${r.time}${i}`}><span class="when"><SinceTime of={times[i]!} /></span><span class="kind deploy"><Icon name="deploy" size={13} />{r.revision ? `Revision ${r.revision}` : "Template"}</span><span class="images">{r.images.map((x) => <code key={x} class={revisions[i + 1] && !revisions[i + 1]!.images.includes(x) ? "new" : ""}>{x}</code>)}</span></li>
            ))}
          </ol>
          {d.rollouts.length > 0 && (
            <>
              <h3>Rollouts of the last seven days</h3>
              <ul class="changes">{d.rollouts.map((r) => <li key={r.started}><Time at={Date.parse(r.started)} /><Badge level={phaseLevel(r.phase)}>{r.phase}</Badge><span><Link to={["rollouts", r.namespace, r.name]} query={{ started: Date.parse(r.started) }}>{r.image}</Link> {r.reason && <span class="muted">{r.reason}</span>}</span></li>)}</ul>
            </>
          )}
        </Panel>
        <Panel title="Changes">{marks.length === 0 ? <p class="muted">No deploy, rollout or restart in this time.</p> : <Changes list={marks} />}</Panel>
      </div>
      <Panel title="Events">{d.events.length === 0 ? <p class="muted">None in this time.</p> : <EventList events={d.events} />}</Panel>
    </>
  );
}

function Pods({ data: d }: { data: WorkloadAnswer }) {
  const { start, end } = d;
  const name = d.state.name;
  const podColumns: Column<Pod>[] = [
    { key: "pod", title: "Pod", value: (p) => p.name, cell: (p) => <span class="end"><Link to={["logs"]} query={{ q: `{job="pods", namespace=${JSON.stringify(d.state.namespace)}, pod=${JSON.stringify(p.name)}}` }} title="Its log">{p.name.startsWith(name + "-") ? <><span class="muted">{name}-</span>{p.name.slice(name.length + 1)}</> : p.name}</Link><small>{[p.node, p.ip].filter(Boolean).join(", ") || "no node"}</small></span> },
    { key: "state", title: "State", class: "wide", value: (p) => (p.gone ? "gone" : p.ready ? "ready" : p.phase), cell: (p) => <State pod={p} /> },
    { key: "restarts", title: "Restarts", number: true, value: (p) => p.restarts },
    { key: "last", title: "Last end", value: (p) => lastOf(p)?.last?.finished ?? "", cell: (p) => <LastEnd namespace={d.state.namespace} pod={p} /> },
    { key: "revision", title: "Revision", value: (p) => p.revision ?? "" },
    { key: "lived", title: "Lived", value: (p) => Date.parse(p.created ?? "") || p.firstSeen, cell: (p) => <Lived pod={p} start={start} end={end} /> },
  ];
  return <Table name="pods" columns={podColumns} rows={d.pods} caption="Pods" id={(p) => p.uid || p.name} rowClass={(p) => (p.gone ? "gone" : p.ready ? "" : "warn")} />;
}

/** The container of a pod that ended last, before it was started again. */
const lastOf = (p: Pod): Container | undefined => p.containers?.filter((c) => c.last).sort((a, b) => Date.parse(b.last!.finished ?? "") - Date.parse(a.last!.finished ?? ""))[0];

/** How a pod's container ended last, with a link to what it wrote before. */
function LastEnd({ namespace, pod }: { namespace: string; pod: Pod }) {
  const c = lastOf(pod), last = c?.last;
  if (!c || !last) return <span class="muted">–</span>;
  const at = Date.parse(last.finished ?? ""), text = `${last.reason || "ended"}, code ${last.exitCode}`;
  if (!Number.isFinite(at)) return <span>{text}</span>;
  return <span class="end"><Link to={["logs"]} query={beforeEnd(namespace, pod.name, c.name, at)} title="What it wrote before">{text}</Link><small>{c.name}, <Time at={at} /></small></span>;
}

function State({ pod: p }: { pod: Pod }) {
  if (p.gone) return <span class="muted">gone</span>;
  if (p.ready) return <Badge level="ok">ready</Badge>;
  if (p.phase === "Succeeded") return <Badge level="ok">done</Badge>;
  return <Badge level={p.phase === "Pending" ? "warn" : "bad"}>{p.why || p.reason || p.phase}</Badge>;
}

/** When a pod lived, as a bar within the shown time. */
function Lived({ pod: p, start, end }: { pod: Pod; start: number; end: number }) {
  const from = Math.min(Date.parse(p.created ?? "") || p.firstSeen, p.firstSeen), to = p.gone ? p.lastSeen : end;
  const x = (t: number) => Math.min(100, Math.max(0, ((t - start) / (end - start)) * 100));
  return (
    <span class="lived">
      <span class="track" aria-hidden="true"><i class={p.gone ? "gone" : ""} style={{ insetInlineStart: `${x(from)}%`, inlineSize: `${Math.max(1.5, x(to) - x(from))}%` }} /></span>
      <span>{p.gone ? `${when(from, now())} – ${when(to, from)}` : `for ${span(end - from)}`}</span>
    </span>
  );
}


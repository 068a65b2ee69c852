import type { ComponentChildren } from "preact";
import { api, type Mark, type NodeRow, type Trigger, useData } from "../api";
import { Chart, seriesOf } from "../chart";
import { bytes, count, digits, percent, span } from "../format";
import { podsOf } from "../prepared";
import type { Since } from "../since";
import { place } from "../state";
import { Badge, type Column, Empty, Export, type Level, Link, Meter, Panel, SinceTime, Table, Waiting } from "../ui";
import { timeQuery } from "../url";

interface Nodes {
  start: number;
  end: number;
  triggers: Trigger[];
  nodes: NodeRow[];
}

export function NodesView() {
  const q = place.value.query;
  const answer = useData<Nodes>(api("nodes", timeQuery(q)));
  const marks = useData<{ marks: Mark[] }>(api("marks", timeQuery(q)));
  return (
    <>
      <div class="head"><h1>Nodes</h1><div class="tools">{answer.data && <Export name="nodes" json={() => answer.data} rows={() => [["node", "ready", "cpu %", "memory %", "disk %", "pods", "version"], ...answer.data!.nodes.map((n) => [n.name, String(n.ready), n.cpu ?? "", n.memory ?? "", n.disk ?? "", n.pods, n.version ?? ""])]} />}</div></div>
      <Waiting of={answer}>{(d) => <Body data={d} marks={marks.data?.marks ?? []} />}</Waiting>
    </>
  );
}

function Body({ data: d, marks }: { data: Nodes; marks: Mark[] }) {
  const by = (id: Trigger["id"]) => d.triggers.find((t) => t.id === id);
  const cpu = by("cpu"), memory = by("memory"), server = by("apiserver"), pending = by("pending");
  const percentOf = (v: number) => percent(v / 100);
  return (
    <>
      <Panel title="When to extend the cluster">
        <Table name="triggers" caption="When to extend the cluster" columns={triggerColumns(d)} rows={d.triggers} id={(t) => t.id} rowClass={(t) => (t.firing ? "warn" : "")} />
      </Panel>
      <Panel title="Nodes">
        {d.nodes.length === 0 ? <Empty title="No node was recorded at this time" icon="nodes" /> : <Table columns={nodeColumns} rows={d.nodes} caption="Nodes" id={(n) => n.name} sorted="name" rowClass={(n) => (n.known && !n.ready ? "bad" : "")} />}
      </Panel>
      <div class="columns">
        {cpu && <Panel><Chart title="CPU" series={seriesOf(cpu.lines, "node", {})} start={d.start} end={d.end} format={percentOf} marks={marks} limits={[{ value: cpu.limit, label: "70 %" }]} /></Panel>}
        {memory && <Panel><Chart title="Memory" series={seriesOf(memory.lines, "node", {})} start={d.start} end={d.end} format={percentOf} marks={marks} limits={[{ value: memory.limit, label: "80 %" }]} /></Panel>}
        {server && <Panel><Chart title="API server, p99" series={server.lines.map((l) => ({ label: "p99", points: l.points, color: "c5" }))} start={d.start} end={d.end} format={(v) => `${digits(v)} s`} marks={marks} limits={[{ value: server.limit, label: "1 s" }]} /></Panel>}
        {pending && <Panel><Chart title="Pending pods" series={pending.lines.map((l) => ({ label: "pods", points: l.points, color: "c4" }))} start={d.start} end={d.end} format={digits} marks={marks} /></Panel>}
      </div>
    </>
  );
}

const words: Record<Trigger["id"], { what: string; limit: string; then: string }> = {
  cpu: { what: "CPU", limit: "above 70 % for 10 minutes", then: "Consider another node, or a larger one" },
  memory: { what: "Memory", limit: "above 80 % for 5 minutes", then: "Extend at once" },
  pending: { what: "Pending pods", limit: "more than 0 for 5 minutes", then: "See why: their events" },
  evicted: { what: "Evicted pods", limit: "any", then: "Extend at once" },
  apiserver: { what: "API server", limit: "p99 above 1 s for 5 minutes", then: "Check the control plane" },
};

function valueOf(t: Trigger): string {
  if (!t.known) return "not measured";
  switch (t.id) {
    case "cpu": case "memory": return percent(t.value / 100);
    case "apiserver": return t.value >= 1 ? `${digits(t.value)} s` : `${Math.round(t.value * 1000)} ms`;
    default: return count(t.value, "pod", "pods");
  }
}

const triggerColumns = ({ end }: Nodes): Column<Trigger>[] => [
  { key: "what", title: "Measure", value: (t) => words[t.id].what },
  { key: "state", title: "State", value: (t) => (t.firing ? 1 : 0), cell: (t) => (!t.known ? <Badge level="idle">unknown</Badge> : t.firing ? <Badge level="warn">reached</Badge> : <Badge level="ok">fine</Badge>) },
  { key: "value", title: "Now", number: true, value: (t) => t.value, cell: valueOf },
  { key: "limit", title: "Limit", value: (t) => words[t.id].limit },
  { key: "since", title: "Since", value: (t) => t.since ?? 0, cell: (t) => (t.firing && t.since ? <TriggerSince of={{ time: t.since, before: t.earlier === true }} end={end} /> : <span class="muted">–</span>) },
  { key: "about", title: "What", class: "wide", value: (t) => t.about.join(" "), cell: (t) => (t.about.length === 0 ? <span class="muted">–</span> : <span class="images">{t.about.slice(0, 5).map((a) => <About key={a} trigger={t} name={a} />)}{t.about.length > 5 && <small>{t.about.length - 5} more</small>}</span>) },
  { key: "then", title: "What to do", class: "wide", value: (t) => words[t.id].then },
];

function TriggerSince({ of, end }: { of: Since; end: number }) {
  return <span><SinceTime of={of} /> <small class="muted">{of.before && "more than "}{span(end - of.time)}</small></span>;
}

function About({ trigger: t, name }: { trigger: Trigger; name: string }) {
  if (t.id === "cpu" || t.id === "memory") return <ByPod node={name} resource={t.id}><code>{name}</code></ByPod>;
  if (t.id === "apiserver") return <code>{name}</code>;
  return <Link to={["events"]} query={{ text: name.slice(name.indexOf("/") + 1) }}><code>{name}</code></Link>;
}

/** A link to the pods that use the most of a node. */
function ByPod({ node, resource, children }: { node: string; resource: "cpu" | "memory"; children: ComponentChildren }) {
  return <Link to={["metrics"]} query={{ q: podsOf(node, resource) }} title={`The pods that use the most ${resource === "cpu" ? "CPU" : "memory"} of it`}>{children}</Link>;
}

const use = (value: number | undefined, limit: number): Level | undefined => (value !== undefined && value > limit ? "warn" : undefined);

const nodeColumns: Column<NodeRow>[] = [
  { key: "name", title: "Node", value: (n) => n.name, cell: (n) => <span class="end"><span>{n.name}</span><small>{n.address}</small></span> },
  { key: "state", title: "State", value: (n) => (n.ready ? 1 : 0), cell: (n) => <span class="stack">{!n.known ? <Badge level="idle">unknown</Badge> : n.ready ? <Badge level="ok">ready</Badge> : <Badge level="bad">not ready{n.since && <> since <SinceTime of={{ time: n.since, before: n.earlier === true }} /></>}</Badge>}{n.cordoned && <Badge level="note">cordoned</Badge>}{n.pressure.map((p) => <Badge key={p} level="warn">{p}</Badge>)}</span> },
  { key: "cpu", title: "CPU", number: true, value: (n) => n.cpu, cell: (n) => (n.cpu === undefined ? <span class="muted">–</span> : <ByPod node={n.name} resource="cpu"><Meter share={n.cpu / 100} text={`${percent(n.cpu / 100)}${n.cpus ? ` of ${n.cpus}` : ""}`} level={use(n.cpu, 70)} /></ByPod>) },
  { key: "memory", title: "Memory", number: true, value: (n) => n.memory, cell: (n) => (n.memory === undefined ? <span class="muted">–</span> : <ByPod node={n.name} resource="memory"><Meter share={n.memory / 100} text={`${percent(n.memory / 100)}${n.bytes ? ` of ${bytes(n.bytes)}` : ""}`} level={use(n.memory, 80)} /></ByPod>) },
  { key: "disk", title: "Disk", number: true, value: (n) => n.disk, cell: (n) => (n.disk === undefined ? <span class="muted">–</span> : <Meter share={n.disk / 100} text={percent(n.disk / 100)} level={use(n.disk, 85)} />) },
  { key: "pods", title: "Pods", number: true, value: (n) => n.pods, cell: (n) => <>{n.pods}{n.maxPods ? <span class="muted">/{n.maxPods}</span> : ""}</> },
  { key: "version", title: "Version", class: "wide", value: (n) => n.version ?? "", cell: (n) => <span class="end"><span>{n.version ?? "–"}</span><small>{[n.os, n.kernel].filter(Boolean).join(", ")}</small></span> },
];

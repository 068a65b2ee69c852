import { api, type Line, type Mark, type RequestEntry, useData } from "../api";
import { Chart, classStyles, quantileStyles, seriesOf } from "../chart";
import { bytes, clockMs, digits, ms, percent, rate, short } from "../format";
import { edgeHealth, type GraphEdge, type GraphNode, securityText, subtitle, title } from "../graph";
import { Icon } from "../icons";
import { place } from "../state";
import { Badge, type Column, Empty, Export, Link, Panel, Stat, Table, ViewLink, Waiting } from "../ui";
import { timeParam, timeQuery } from "../url";

interface Edge {
  start: number;
  end: number;
  shortened: boolean;
  edge: GraphEdge;
  nodes: GraphNode[];
  codes: { code: string; grpc?: string; flags?: string; meaning?: string; requests: number; failed: boolean }[];
  principals: { source?: string; destination?: string; policy: string; count: number }[];
  rates: Line[];
  quantiles: Line[];
  bytes: Line[];
  requests: RequestEntry[];
  logged?: string;
}

export function EdgeView() {
  const [, fromNs, from, toNs, to] = place.value.path;
  const q = place.value.query;
  const query = timeQuery(q);
  const name = (v: string | undefined) => (v === undefined || v === "-" ? "" : v);
  query.set("from-ns", name(fromNs));
  query.set("from", name(from));
  query.set("to-ns", name(toNs));
  query.set("to", to ?? "");
  if (q.get("kind")) query.set("to-kind", q.get("kind")!);
  const answer = useData<Edge>(api("edge", query));
  const marks = useData<{ marks: Mark[] }>(api("marks", timeQuery(q)));
  const known = (end: "source" | "target") => answer.data?.nodes[answer.data.edge[end]];
  return (
    <>
      <nav class="crumbs" aria-label="Path"><ViewLink view="graph">Graph</ViewLink></nav>
      <div class="head">
        <h1 class="ends">
          <EndName node={known("source")} namespace={name(fromNs)} text={name(from) || "no sidecar"} />
          <Icon name="right" label="to" />
          <EndName node={known("target")} namespace={name(toNs)} text={to ?? ""} />
        </h1>
        {answer.data && <div class="tools">{known("target")?.kind === "workload" && <Link class="button" to={["traces"]} query={{ service: `${to}.${toNs}` }} title="Traces of the called workload"><Icon name="traces" />Traces</Link>}<Export name={`edge-${from}-${to}`} json={() => answer.data} rows={() => requestRows(answer.data!.requests)} /></div>}
      </div>
      <Waiting of={answer}>{(d) => <Body data={d} marks={marks.data?.marks ?? []} />}</Waiting>
      {answer.error?.status === 404 && <Empty title="No calls in this time" icon="graph"><p>Choose an earlier or a longer time.</p></Empty>}
    </>
  );
}

function EndName({ node, namespace, text }: { node: GraphNode | undefined; namespace: string; text: string }) {
  const isWorkload = node ? node.kind === "workload" : namespace !== "";
  return (
    <span class="end">
      {isWorkload && namespace ? <Link to={["workloads", namespace, text]}>{text}</Link> : <span>{text}</span>}
      <small>{node ? subtitle(node) : namespace}</small>
    </span>
  );
}

function Body({ data: d, marks }: { data: Edge; marks: Mark[] }) {
  const e = d.edge, h = edgeHealth(e);
  const ends = d.nodes.filter((n) => n.problem);
  const http = e.rate > 0;
  return (
    <>
      <dl class="stats">
        {http && <Stat label="Requests" value={rate(e.rate)} hint={`${Math.round(e.requests)} in this time`} />}
        {http && <Stat label="Errors" value={percent(e.errors / e.rate)} level={h === "ok" || h === "idle" ? undefined : h} hint={e.errors > 0 ? rate(e.errors) : "none"} />}
        {http && <Stat label="p50" value={e.p50 === undefined ? "–" : ms(e.p50)} />}
        {http && <Stat label="p95" value={e.p95 === undefined ? "–" : ms(e.p95)} />}
        {http && <Stat label="p99" value={e.p99 === undefined ? "–" : ms(e.p99)} />}
        {e.tcp && <Stat label="Sent" value={`${bytes(e.tcp.sent)}/s`} hint="TCP" />}
        {e.tcp && <Stat label="Received" value={`${bytes(e.tcp.received)}/s`} hint={`${rate(e.tcp.connections)} connections`} />}
        <Stat label="Security" value={{ mtls: "mutual TLS", plain: "plain", mixed: "mixed", unknown: "unknown" }[e.security]} level={e.security === "plain" || e.security === "mixed" ? "warn" : undefined} hint={e.security === "unknown" ? "no sidecar at the called side" : "seen by the called side"} />
        {e.weight !== undefined && <Stat label="Rollout" value={`${e.weight} %`} hint="of the requests" />}
      </dl>
      {ends.map((n) => <p key={n.name}><Badge level="warn">{title(n)}: {n.problem}</Badge></p>)}
      <div class="columns">
        {http && <Panel><Chart title="Requests per second" series={seriesOf(d.rates, "class", classStyles)} start={d.start} end={d.end} format={digits} marks={marks} /></Panel>}
        {http && <Panel><Chart title="Duration" series={seriesOf(d.quantiles, "quantile", quantileStyles)} start={d.start} end={d.end} format={ms} marks={marks} /></Panel>}
        <Panel>
          <Chart title="Bytes per second" series={seriesOf(d.bytes, "direction", { sent: { color: "c1" }, received: { color: "c2", dash: [6, 3] } })} start={d.start} end={d.end} format={bytes} binary marks={marks} />
        </Panel>
        {http && (
          <Panel title="Responses">
            <Table
              name="codes" sorted="-requests" caption="Responses by code" rows={d.codes} id={(c) => JSON.stringify([c.code, c.grpc, c.flags])}
              columns={[
                { key: "code", title: "Code", value: (c) => c.code, cell: (c) => (c.failed ? <Badge level="bad">{c.code === "0" ? "none" : c.code}</Badge> : <span>{c.code}</span>) },
                ...(d.codes.some((c) => c.grpc) ? [{ key: "grpc", title: "gRPC", value: (c: Edge["codes"][0]) => c.grpc }] : []),
                { key: "flags", title: "What happened", value: (c) => c.flags ?? "", cell: (c) => (c.flags ? <>{c.meaning || "see Envoy's response flags"} <code>{c.flags}</code></> : <span class="muted">–</span>) },
                { key: "requests", title: "Requests", number: true, value: (c) => c.requests, cell: (c) => digits(Math.round(c.requests)) },
                { key: "share", title: "Share", number: true, value: (c) => c.requests, cell: (c) => percent(c.requests / Math.max(1, e.requests)) },
              ]}
            />
          </Panel>
        )}
      </div>
      <Panel title="Identities">
        {d.principals.length === 0 ? <p class="muted">The called side has no sidecar, so no one has seen who called.</p> : (
          <ul class="principals">
            {d.principals.map((p) => (
              <li key={JSON.stringify(p)}>
                <Icon name={p.policy === "mutual_tls" ? "lock" : p.policy === "none" ? "unlock" : "unknown"} label={p.policy === "mutual_tls" ? securityText({ ...e, security: "mtls" }) : p.policy === "none" ? "without encryption" : "encryption unknown"} />
                <span><code>{p.source ?? "no certificate"}</code> → <code>{p.destination ?? "no certificate"}</code></span>
                <small>{digits(Math.round(p.count))}</small>
              </li>
            ))}
          </ul>
        )}
      </Panel>
      <Panel title="Last requests" actions={d.logged === "destination" ? <span class="muted">as the called side logged them: callers are not told apart</span> : undefined}>
        {d.requests.length === 0 ? (
          <Empty title={http ? "No access log" : "No connections in the access log"} icon="logs"><p>The proxies of this connection logged no request in this time. Access logs are on with the profile <code>demo</code>, or by a Telemetry resource.</p></Empty>
        ) : (
          <Table columns={requestColumns} rows={d.requests} caption="Last requests" id={(r) => `${r.time}${r.requestId}${r.pod}${r.path}`} sorted="-time" rowClass={(r) => (r.code >= 500 || r.code === 0 ? "bad" : "")} />
        )}
      </Panel>
    </>
  );
}

const requestColumns: Column<RequestEntry>[] = [
  { key: "time", title: "Time", value: (r) => r.time, cell: (r) => clockMs(r.start ? Date.parse(r.start) : r.time) },
  {
    key: "request", title: "Request", class: "wide", value: (r) => r.path ?? "", cell: (r) => {
      const text = r.method ? `${r.method} ${r.path ?? ""}` : (r.upstreamCluster ?? "connection");
      return r.requestId ? <Link to={["request", r.requestId]} query={{ at: timeParam(r.time) }}><code>{text}</code></Link> : <code>{text}</code>;
    },
  },
  { key: "code", title: "Code", value: (r) => r.code, cell: (r) => (r.code >= 500 || r.code === 0 ? <Badge level="bad">{r.code === 0 ? "none" : r.code}</Badge> : r.code) },
  { key: "flags", title: "Flags", value: (r) => r.flags ?? "", cell: (r) => (r.flags ? <abbr title={r.meaning}>{r.flags}</abbr> : <span class="muted">–</span>) },
  { key: "duration", title: "Duration", number: true, value: (r) => r.duration, cell: (r) => ms(r.duration) },
  { key: "bytes", title: "Bytes", number: true, value: (r) => r.sent, cell: (r) => bytes(r.sent) },
  { key: "pod", title: "Pod", value: (r) => r.pod },
  { key: "id", title: "Request id", value: (r) => r.requestId ?? "", cell: (r) => (r.requestId ? <code title={r.requestId}>{short(r.requestId)}</code> : "–") },
];

function requestRows(requests: RequestEntry[]): (string | number)[][] {
  return [
    ["time", "method", "path", "code", "flags", "duration ms", "received", "sent", "pod", "request id"],
    ...requests.map((r) => [r.start ?? new Date(r.time).toISOString(), r.method ?? "", r.path ?? "", r.code, r.flags ?? "", r.duration, r.received, r.sent, r.pod, r.requestId ?? ""]),
  ];
}


import { api, type Line, type Mark, type Rollout, type RolloutMeasure, useData } from "../api";
import { Chart, type Series } from "../chart";
import { digits, durationMs, ms, percent, span, when } from "../format";
import { Icon } from "../icons";
import { now, place } from "../state";
import { Badge, type Column, Empty, Export, type Level, Link, Panel, Stat, Table, Time, ViewLink, Waiting } from "../ui";
import { endOf, timeQuery } from "../url";

export function phaseLevel(phase: string): Level {
  switch (phase) {
    case "Promoted": return "ok";
    case "RolledBack": return "bad";
    case "Aborted": case "RollingBack": return "warn";
    default: return "note";
  }
}

const phaseWords: Record<string, string> = { Starting: "starting", Running: "under way", Promoting: "promoting", RollingBack: "rolling back", Promoted: "promoted", RolledBack: "rolled back", Aborted: "aborted" };

/** What has not ended is as old as it was at the end of the shown time. */
const shownEnd = (): number => endOf(place.value.query) ?? now();

/** Rollouts are rare: a week of them, whatever the shown time is. */
function weekQuery(): URLSearchParams {
  const q = timeQuery(place.value.query);
  q.set("window", "7d");
  return q;
}

export function RolloutsView() {
  const q = place.value.query;
  const query = weekQuery();
  for (const ns of q.getAll("ns")) query.append("ns", ns);
  const answer = useData<{ rollouts: Rollout[] }>(api("rollouts", query));
  const columns: Column<Rollout>[] = [
    { key: "started", title: "Started", value: (r) => Date.parse(r.started), cell: (r) => <Time at={Date.parse(r.started)} /> },
    { key: "name", title: "Deployment", value: (r) => r.name, cell: (r) => <span class="end"><Link to={["rollouts", r.namespace, r.name]} query={{ started: Date.parse(r.started) }}>{r.name}</Link><small>{r.namespace}</small></span> },
    { key: "phase", title: "State", value: (r) => r.phase, cell: (r) => <Badge level={phaseLevel(r.phase)}>{phaseWords[r.phase] ?? r.phase}</Badge> },
    { key: "weight", title: "Canary", number: true, value: (r) => r.weight, cell: (r) => (r.ended ? <span class="muted">–</span> : `${r.weight} %`) },
    { key: "image", title: "Image", class: "wide", value: (r) => r.image, cell: (r) => <span class="images"><code>{r.previous}</code> → <code>{r.image}</code></span> },
    { key: "reason", title: "Why", class: "wide", value: (r) => r.reason ?? "", cell: (r) => r.reason || <span class="muted">–</span> },
    { key: "took", title: "Took", number: true, value: (r) => (Date.parse(r.ended ?? "") || shownEnd()) - Date.parse(r.started), cell: (r) => span((Date.parse(r.ended ?? "") || shownEnd()) - Date.parse(r.started)) },
  ];
  return (
    <>
      <div class="head"><h1>Rollouts</h1><div class="tools"><span class="muted">of the seven days before {endOf(q) === undefined ? "now" : when(endOf(q)!, now())}</span>{answer.data && <Export name="rollouts" json={() => answer.data!.rollouts} />}</div></div>
      <Panel>
        <Waiting of={answer}>
          {(d) => d.rollouts.length === 0 ? (
            <Empty title="No rollout in these seven days" icon="rollouts"><p><code>polymesh rollout canary NAME -n NAMESPACE --image IMAGE</code> rolls out an image step by step, and back if it fails.</p></Empty>
          ) : <Table columns={columns} rows={d.rollouts} caption="Rollouts" id={(r) => JSON.stringify([r.namespace, r.name, r.started])} sorted="-started" />}
        </Waiting>
      </Panel>
    </>
  );
}

interface Detail {
  rollout: Rollout;
  history: { time: number; phase: string; step: number; weight: number; reason?: string }[];
  start: number;
  end: number;
  rates: Line[];
  errors: Line[];
  p99: Line[];
}

export function RolloutView() {
  const [, namespace = "", name = ""] = place.value.path;
  const q = place.value.query;
  const query = weekQuery();
  if (q.get("started")) query.set("started", q.get("started")!);
  const answer = useData<Detail>(api(`rollouts/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}`, query));
  return (
    <>
      <nav class="crumbs" aria-label="Path"><ViewLink view="rollouts">Rollouts</ViewLink></nav>
      <div class="head">
        <h1 class="ends"><span class="end"><Link to={["workloads", namespace, name]}>{name}</Link><small>rollout, {namespace}</small></span></h1>
        <div class="tools">{answer.data && <Export name={`rollout-${name}`} json={() => answer.data} />}</div>
      </div>
      <Waiting of={answer}>{(d) => <Body data={d} />}</Waiting>
      {answer.error?.status === 404 && <Empty title="No such rollout was recorded" icon="rollouts" />}
    </>
  );
}

function Body({ data: d }: { data: Detail }) {
  const r = d.rollout;
  const marks: Mark[] = d.history.map((h) => ({ time: h.time, kind: "rollout", text: `${phaseWords[h.phase] ?? h.phase}${h.weight ? `, ${h.weight} %` : ""}` }));
  const canary = `${r.name}-canary`;
  const series = (lines: Line[]): Series[] => lines.map((l) => (l.labels?.destination_workload === canary ? { label: "canary", points: l.points, color: "c2", dash: [6, 3] } : { label: "stable", points: l.points, color: "c1" }));
  const limitMs = durationMs(r.plan.maxP99);
  return (
    <>
      <div class={`headline ${phaseLevel(r.phase)}`}>
        <Icon name={{ ok: "ok", bad: "bad", warn: "warn", note: "rollouts", idle: "idle" }[phaseLevel(r.phase)] as "ok"} size={22} />
        <div>
          <p class="verdict">{outcome(r)}</p>
          {r.reason && <p>{r.reason}</p>}
        </div>
      </div>
      <ol class="steps" aria-label="Steps">
        {r.plan.steps.map((weight, i) => {
          const done = r.done?.[i], state = done ? (r.phase === "RolledBack" && i === (r.done?.length ?? 0) - 1 ? "bad" : "ok") : !r.ended && i === r.step ? "note" : "idle";
          return (
            <li key={weight} class={state}>
              <header><Icon name={state === "note" ? "play" : (state as "ok")} size={13} label={{ ok: "done", bad: "failed", note: "under way", idle: "not begun" }[state]} /><b>{weight} %</b></header>
              {done ? <dl class="facts small"><dt>canary</dt><dd><Measured of={done.canary} plan={r.plan} /></dd><dt>stable</dt><dd><Measured of={done.stable} /></dd></dl> : <p class="muted">{state === "note" ? `measured for ${r.plan.interval.replace(/(\D)0s$/, "$1")}` : "–"}</p>}
            </li>
          );
        })}
      </ol>
      <dl class="stats">
        <Stat label="Image" value={<code>{r.image}</code>} hint={`instead of ${r.previous}`} />
        <Stat label="Started" value={when(Date.parse(r.started), now(), true)} hint={r.ended ? `took ${span(Date.parse(r.ended) - Date.parse(r.started))}` : `for ${span(shownEnd() - Date.parse(r.started))}`} />
        <Stat label="Limits" value={`${r.plan.maxErrorRate} % · ${r.plan.maxP99}`} hint={`errors and p99, of at least ${r.plan.minRequests} requests`} />
      </dl>
      <div class="columns">
        <Panel><Chart title="Failed requests" series={series(d.errors)} start={d.start} end={d.end} format={percent} marks={marks} limits={[{ value: r.plan.maxErrorRate / 100, label: "limit" }]} empty="No requests were measured." /></Panel>
        <Panel><Chart title="Duration, p99" series={series(d.p99)} start={d.start} end={d.end} format={ms} marks={marks} limits={limitMs ? [{ value: limitMs, label: "limit" }] : []} empty="No requests were measured." /></Panel>
        <Panel><Chart title="Requests per second" series={series(d.rates)} start={d.start} end={d.end} format={digits} marks={marks} empty="No requests were measured." /></Panel>
        <Panel title="What happened">
          <ol class="changes">
            {d.history.map((h) => <li key={h.time}><Time at={h.time} seconds /><Badge level={phaseLevel(h.phase)}>{phaseWords[h.phase] ?? h.phase}</Badge><span>{h.weight > 0 ? `${h.weight} % to the canary` : ""} <span class="muted">{h.reason}</span></span></li>)}
          </ol>
        </Panel>
      </div>
    </>
  );
}

function outcome(r: Rollout): string {
  switch (r.phase) {
    case "Promoted": return `Promoted to ${r.image}`;
    case "RolledBack": return `Rolled back to ${r.final || r.previous}`;
    case "Aborted": return `Aborted, back to ${r.final || r.previous}`;
    default: return `Under way: ${r.weight} % of the requests go to ${r.image}`;
  }
}

function Measured({ of: m, plan }: { of: RolloutMeasure; plan?: Rollout["plan"] }) {
  if (!m?.requests) return <span class="muted">no requests</span>;
  const bad = plan && (m.errorRate ?? 0) > plan.maxErrorRate;
  const p99 = typeof m.p99 === "string" ? m.p99 : m.p99 === undefined ? undefined : ms(m.p99 / 1e6);
  return <span>{bad ? <Badge level="bad">{m.errorRate} % errors</Badge> : `${m.errorRate ?? 0} % errors`} of {m.requests}{p99 && `, p99 ${p99}`}</span>;
}

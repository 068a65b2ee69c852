import { api, type Mark, type Overview, type Statement, useData } from "../api";
import { Chart, classStyles, markWords, quantileStyles, seriesOf } from "../chart";
import { digits, ms, percent, rate, sentence, when } from "../format";
import { Icon } from "../icons";
import { live, now, place } from "../state";
import { Empty, Link, Panel, Prose, Stat, Time, Waiting, ownLink } from "../ui";
import { timeQuery, windowOf, windowWords } from "../url";
import { Slider } from "../slider";

export function OverviewView() {
  const q = place.value.query;
  const query = timeQuery(q);
  for (const ns of q.getAll("ns")) query.append("ns", ns);
  const answer = useData<Overview>(api("overview", query));
  return (
    <>
      <h1 class="unseen">Overview</h1>
      <Waiting of={answer}>{(data) => <Body data={data} />}</Waiting>
    </>
  );
}

function headline(o: Overview): string {
  if (!o.recorded) return "Nothing was recorded in this time";
  const n = o.statements.filter((s) => s.level !== "note").length;
  if (n === 0) return live.peek() ? "All is well" : "All was well";
  const what = n === 1 ? "One thing" : `${digits(n)} things`;
  return live.peek() ? `${what} need${n === 1 ? "s" : ""} attention` : `${what} needed attention`;
}

function Body({ data }: { data: Overview }) {
  const n = data.numbers;
  if (!data.recorded) {
    return (
      <>
        <Empty title={headline(data)} icon="clock">
          <p>Metrics appear some seconds after the store has started. For a time in the past, choose another one below.</p>
        </Empty>
        <Slider />
      </>
    );
  }
  const level = data.verdict === "note" ? "ok" : data.verdict;
  const share = n.rate > 0 ? n.errors / n.rate : 0;
  return (
    <>
      <div class={`headline ${level}`}>
        <Icon name={level === "ok" ? "ok" : level} size={22} />
        <div>
          <p class="verdict">{headline(data)}</p>
          <p class="muted">{live.value ? `In the last ${windowWords[windowOf(place.value.query).text] ?? windowOf(place.value.query).text}` : `From ${when(data.start, now())} to ${when(data.end, data.start)}`}</p>
        </div>
      </div>
      <dl class="stats">
        <Stat label="Requests" value={rate(n.rate)} hint={`${n.calls} connections`} />
        <Stat label="Errors" value={n.rate > 0 ? percent(share) : "–"} level={share >= 0.05 ? "bad" : share >= 0.01 ? "warn" : undefined} hint={n.errors > 0 ? rate(n.errors) : "none"} />
        <Stat label="p99" value={n.p99 === undefined ? "–" : ms(n.p99)} hint="of all requests" />
        <Stat label="Workloads" value={<>{n.readyWorkloads}<span class="of">/{n.workloads}</span></>} level={n.readyWorkloads < n.workloads ? "warn" : undefined} hint={`${n.readyPods} of ${n.pods} pods ready`} />
        <Stat label="Nodes" value={<>{n.readyNodes}<span class="of">/{n.nodes}</span></>} level={n.readyNodes < n.nodes ? "bad" : undefined} hint="ready" />
        <Stat label="Mutual TLS" value={n.knownSecurity > 0 ? percent(n.mutualTLS / n.knownSecurity) : "–"} hint={n.knownSecurity > 0 ? `${n.mutualTLS} of ${n.knownSecurity} connections` : "no connections"} />
      </dl>
      {data.statements.length > 0 && (
        <Panel title="What is going on">
          <ul class="statements">{data.statements.map((s) => <Sentence key={s.text} of={s} />)}</ul>
        </Panel>
      )}
      <div class="columns">
        <Panel>
          <Chart title="Requests per second" series={seriesOf(data.rates, "class", classStyles)} start={data.start} end={data.end} format={digits} marks={data.changes} empty="No requests in this time." />
        </Panel>
        <Panel>
          <Chart title="Duration" series={seriesOf(data.quantiles, "quantile", quantileStyles)} start={data.start} end={data.end} format={ms} marks={data.changes} empty="No requests in this time." />
        </Panel>
      </div>
      <Panel title="Changes">
        {data.changes.length === 0 ? <p class="muted">No deploy, rollout or restart in this time.</p> : <Changes list={data.changes} />}
      </Panel>
      <Slider />
    </>
  );
}

function Sentence({ of: s }: { of: Statement }) {
  const href = ownLink(s.link);
  return (
    <li class={s.level}>
      <Icon name={s.level} label={{ bad: "Bad", warn: "Warning", note: "Note" }[s.level]} />
      <div>
        <p>{href ? <a href={href}><Prose text={s.text} /></a> : <Prose text={s.text} />}</p>
        {(s.why || s.advice) && <p class="muted"><Prose text={[s.why, s.advice].filter(Boolean).map((t) => sentence(t!)).join(" ")} /></p>}
      </div>
      <span class="since">{s.since !== undefined && s.since > 0 && <>{s.once ? "at" : "since"} <Time at={s.since} />{s.earlier && " or earlier"}</>}</span>
    </li>
  );
}

export function Changes({ list }: { list: Mark[] }) {
  return (
    <ol class="changes">
      {list.slice(0, 50).map((m) => (
        <li key={`${m.time}${m.kind}${m.text}`}>
          <Time at={m.time} seconds />
          <span class={`kind ${m.kind}`}><Icon name={m.kind} size={13} />{markWords[m.kind]}</span>
          <span>{m.workload && m.namespace ? <Link to={["workloads", m.namespace, m.workload]}>{m.workload}</Link> : null} <span class="text">{m.text}</span></span>
        </li>
      ))}
    </ol>
  );
}

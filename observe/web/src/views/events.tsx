import { api, type ClusterEvent, useData } from "../api";
import { repeatedEvents } from "../events";
import { clock } from "../format";
import { place } from "../state";
import { Badge, Empty, Export, Flag, Link, Panel, Text, Time, Waiting } from "../ui";
import { timeQuery } from "../url";

export function EventsView() {
  const q = place.value.query;
  const query = timeQuery(q);
  for (const ns of q.getAll("ns")) query.append("ns", ns);
  for (const name of ["warning", "kind", "reason", "text", "workload"]) if (q.get(name)) query.set(name, q.get(name)!);
  const answer = useData<{ events: ClusterEvent[]; more: boolean }>(api("events", query));
  const kinds = [...new Set(answer.data?.events.map((e) => e.kind ?? "") ?? [])].sort(), reasons = [...new Set(answer.data?.events.map((e) => e.reason ?? "") ?? [])].sort();
  return (
    <>
      <div class="head">
        <h1>Events</h1>
        <div class="tools">
          <Flag name="warning">Only warnings</Flag>
          {answer.data && <Export name="events" json={() => answer.data!.events} rows={() => [["time", "namespace", "workload", "kind", "name", "type", "reason", "text"], ...answer.data!.events.map((e) => [new Date(e.time).toISOString(), e.namespace ?? "", e.workload ?? "", e.kind ?? "", e.name ?? "", e.warning ? "Warning" : "Normal", e.reason ?? "", e.text])]} />}
        </div>
      </div>
      <div class="filters">
        <Text name="text" label="Text" />
        <Text name="reason" label="Reason" list="reasons" />
        <Text name="kind" label="Kind" list="kinds" />
        <Text name="workload" label="Workload" />
        <datalist id="reasons">{reasons.map((r) => <option key={r} value={r} />)}</datalist>
        <datalist id="kinds">{kinds.map((k) => <option key={k} value={k} />)}</datalist>
      </div>
      <Panel>
        <Waiting of={answer}>
          {(d) => d.events.length === 0 ? (
            <Empty title="No events in this time" icon="events"><p>The API server forgets events after an hour; here they stay.</p></Empty>
          ) : (
            <>
              <EventList events={d.events} />
              {d.more && <p class="muted">Only the newest 500 are shown. Choose a shorter time for more.</p>}
            </>
          )}
        </Waiting>
      </Panel>
    </>
  );
}

export function EventList({ events }: { events: ClusterEvent[] }) {
  return (
    <ol class="event-list">
      {repeatedEvents(events).map(({ event: e, times, first }) => (
        <li key={JSON.stringify([e.time, e.kind, e.name, e.reason])} class={e.warning ? "warn" : ""}>
          <Time at={e.time} seconds />
          <span class="reason">{e.warning ? <Badge level="warn">{e.reason || "Warning"}</Badge> : <span class="plain">{e.reason || "Normal"}</span>}{times > 1 && <small title={`the first of those shown at ${clock(first)}`}> ×{times}</small>}</span>
          <span class="about">{e.workload && e.namespace ? <Link to={["workloads", e.namespace, e.workload]}>{e.name || e.workload}</Link> : (e.name ?? "")}<small>{[e.kind, e.namespace].filter(Boolean).join(", ")}</small></span>
          <span class="text">{e.text}</span>
        </li>
      ))}
    </ol>
  );
}

// The page's entry: which view a path shows.
import { type ComponentType, render } from "preact";
import { useEffect } from "preact/hooks";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { Shell } from "./shell";
import { go, place, start } from "./state";
import { Empty, Link } from "./ui";
import { EdgeView } from "./views/edge";
import { EventsView } from "./views/events";
import { GraphView } from "./views/graph";
import { LogsView } from "./views/logs";
import { MetricsView } from "./views/metrics";
import { NodesView } from "./views/nodes";
import { OverviewView } from "./views/overview";
import { RequestView } from "./views/request";
import { RolloutsView, RolloutView } from "./views/rollouts";
import { CompareView, TracesView } from "./views/traces";
import { WorkloadsView, WorkloadView } from "./views/workloads";

const single: Record<string, { view: ComponentType; title: string }> = {
  "": { view: OverviewView, title: "Overview" },
  graph: { view: GraphView, title: "Graph" },
  logs: { view: LogsView, title: "Logs" },
  traces: { view: TracesView, title: "Traces" },
  metrics: { view: MetricsView, title: "Metrics" },
  workloads: { view: WorkloadsView, title: "Workloads" },
  rollouts: { view: RolloutsView, title: "Rollouts" },
  events: { view: EventsView, title: "Events" },
  nodes: { view: NodesView, title: "Nodes" },
};

const withParts: Record<string, { view: ComponentType; parts: number; title: (path: string[]) => string }> = {
  edge: { view: EdgeView, parts: 5, title: (p) => `${p[2]} to ${p[4]}` },
  request: { view: RequestView, parts: 2, title: (p) => `Request ${p[1]}` },
  compare: { view: CompareView, parts: 3, title: () => "Two traces" },
  workloads: { view: WorkloadView, parts: 3, title: (p) => p[2]! },
  rollouts: { view: RolloutView, parts: 3, title: (p) => `Rollout of ${p[2]}` },
};

function viewOf(path: string[]): { view: ComponentType; title: string } {
  if (path.length <= 1) {
    const v = single[path[0] ?? ""];
    if (v && Object.hasOwn(single, path[0] ?? "")) return v;
  } else {
    const v = Object.hasOwn(withParts, path[0]!) ? withParts[path[0]!] : undefined;
    if (v && path.length === v.parts) return { view: v.view, title: v.title(path) };
  }
  return { view: Missing, title: "No such view" };
}

function Missing() {
  return <><h1 class="unseen">No such view</h1><Empty title="There is no such view" icon="search"><p><Link to={[]}>Overview</Link></p></Empty></>;
}

function App() {
  const { path } = place.value;
  const { view: View, title } = viewOf(path);
  const key = path.join("\u0000");
  useEffect(() => {
    document.title = title === "Overview" ? "Polymesh" : `${title.slice(0, 100)} – Polymesh`;
  }, [title]);
  return <Shell><View key={key} /></Shell>;
}

// Links of the page change its state and load nothing.
document.addEventListener("click", (e) => {
  if (e.defaultPrevented || e.button !== 0 || e.ctrlKey || e.metaKey || e.shiftKey || e.altKey || !(e.target instanceof Element)) return;
  const a = e.target.closest("a[href]");
  const href = a?.getAttribute("href");
  if (!href || !/^\/(?![/\\])/.test(href)) return;
  e.preventDefault();
  const before = place.peek().path.join("\u0000");
  go(href);
  if (place.peek().path.join("\u0000") !== before) {
    scrollTo(0, 0);
    document.getElementById("main")?.focus({ preventScroll: true });
  }
});

await start();
render(<App />, document.getElementById("app")!);

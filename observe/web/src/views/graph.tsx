import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { api, useData } from "../api";
import { bytes, count, ms, percent, rate } from "../format";
import {
  edgeHealth, edgeLabel, edgePath, edgePattern, edgeSentence, edgeWidth, fit, type Focus, type Graph, type GraphEdge, type GraphNode, graphRows, layout, type Layout, move, nodeHealth,
  nodeKey, nodeLetters, nodeSentence, securityText, subtitle, tabOrder, title,
} from "../graph";
import { Icon, iconPath, type IconName } from "../icons";
import { go, place, set } from "../state";
import { Slider } from "../slider";
import { Badge, Choice, type Column, Empty, Errors, Export, Flag, Link, Menu, Panel, Table, Text, Waiting } from "../ui";
import { placeOf, timeQuery } from "../url";

export function GraphView() {
  const q = place.value.query;
  const query = timeQuery(q);
  for (const name of ["ns", "open"]) for (const v of q.getAll(name)) query.append(name, v);
  for (const name of ["errors", "focus", "focus-ns"]) if (q.get(name)) query.set(name, q.get(name)!);
  const table = q.get("view") === "table";
  if (table) query.set("table", "1");
  const answer = useData<Graph>(api("graph", query));
  const svg = useRef<SVGSVGElement>(null);
  return (
    <>
      <div class="head">
        <h1>Service graph</h1>
        <div class="tools">
          <Text name="find" label="Find" placeholder="workload" />
          <Flag name="errors">Only failing</Flag>
          {answer.data && (answer.data.nodes.length > 30 || q.has("open") || answer.data.namespaces.some((n) => n.box)) && <Boxes graph={answer.data} />}
          <Choice label="View" value={table ? "table" : "graph"} onChange={(v) => set({ view: v === "table" ? "table" : undefined })} options={[{ value: "graph", text: <><Icon name="graph" />Graph</> }, { value: "table", text: <><Icon name="table" />Table</> }]} />
          {answer.data && <Export name="polymesh-graph" json={() => answer.data} rows={() => graphRows(answer.data!)} svg={table ? undefined : () => exportSVG(svg.current)} />}
        </div>
      </div>
      <Waiting of={answer}>
        {(g) => (
          <>
            {q.get("focus") && (
              <p class="chips">
                <span class="chip">Only {q.get("focus")} and its neighbors<button type="button" aria-label="Show all" onClick={() => set({ focus: undefined, "focus-ns": undefined })}><Icon name="close" size={10} /></button></span>
              </p>
            )}
            {g.edges.length === 0 ? <Nothing graph={g} /> : table ? <EdgeTable graph={g} /> : <Drawing graph={g} svg={svg} />}
            <p class="foot muted">
              {count(g.workloads, "workload", "workloads")}, {count(g.calls, "connection", "connections")}
              {g.shortened && <>. The store has recorded for {Math.max(1, Math.round((g.end - g.start) / 60_000))} min of this time</>}
              {g.untimed && <>. There are too many connections to read their durations: choose a namespace</>}
            </p>
          </>
        )}
      </Waiting>
      <Slider />
    </>
  );
}

function Nothing({ graph: g }: { graph: Graph }) {
  const q = place.value.query;
  if (g.calls > 0) {
    return (
      <Empty title={q.get("errors") ? "No requests fail" : "Nothing here matches"} icon={q.get("errors") ? "ok" : "search"}>
        <p>{count(g.calls, "connection is", "connections are")} outside of what was chosen.</p>
        <p><button type="button" onClick={() => set({ ns: undefined, errors: undefined, focus: undefined, "focus-ns": undefined })}>Show all</button></p>
      </Empty>
    );
  }
  return (
    <Empty title="No requests in this time" icon="graph">
      <p>The graph shows what sidecars and gateways measure. Send a request through the gateway, and it appears within half a minute; or choose an earlier time below.</p>
    </Empty>
  );
}

/** Which namespaces are boxes. */
function Boxes({ graph: g }: { graph: Graph }) {
  const q = place.value.query;
  const open = q.getAll("open"), boxes = g.namespaces.filter((n) => n.box).length;
  return (
    <Menu label="Namespaces as boxes" text={boxes > 0 ? `${boxes} boxes` : "Boxes"} icon="namespace" right>
      <fieldset class="checks">
        <legend>Shown with all workloads</legend>
        <div>
          {g.namespaces.slice(0, 300).map((n) => (
            <label key={n.name}>
              <input type="checkbox" checked={!n.box} disabled={!n.box && !open.includes(n.name)} onChange={() => set({ open: open.includes(n.name) ? open.filter((o) => o !== n.name) : [...open, n.name] })} />
              <span>{n.name}</span>
              <small>{n.workloads}</small>
            </label>
          ))}
        </div>
        {boxes === 0 && open.length === 0 && <p class="muted">There is room for all of them. With more than 60 workloads, namespaces become boxes.</p>}
      </fieldset>
    </Menu>
  );
}

const kindIcons: Record<GraphNode["kind"], IconName> = { workload: "workloads", service: "service", external: "external", unknown: "unknown", namespace: "namespace", rest: "rest" };
const iconOf = (n: GraphNode): IconName => (n.kind === "workload" && /gateway/.test(n.name) ? "gateway" : kindIcons[n.kind]);
const lockOf: Record<GraphEdge["security"], IconName> = { mtls: "lock", plain: "unlock", mixed: "mixed", unknown: "unknown" };

let context: CanvasRenderingContext2D | null | undefined;

/** The width of a text in the page's font. */
function measure(text: string, size: number, bold: boolean): number {
  context ??= document.createElement("canvas").getContext("2d");
  if (!context) return text.length * size * 0.6;
  context.font = `${bold ? 640 : 400} ${size}px ${getComputedStyle(document.body).fontFamily}`;
  return context.measureText(text).width;
}

function Drawing({ graph: g, svg }: { graph: Graph; svg: { current: SVGSVGElement | null } }) {
  const stage = useRef<HTMLDivElement>(null);
  const [size, setSize] = useState({ width: 0, height: 0 });
  const [zoom, setZoom] = useState(1);
  const narrow = size.width > 0 && size.width < 700;
  // From left to right, unless it is easier to read from top to bottom.
  const { l, direction } = useMemo(() => {
    const down = layout(g, "TB", measure), right = narrow ? down : layout(g, "LR", measure);
    const room = (x: Layout) => Math.min(1, (size.width - 4) / x.width, (size.height - 4) / x.height);
    return narrow || room(down) > 1.1 * room(right) ? { l: down, direction: "TB" as const } : { l: right, direction: "LR" as const };
  }, [g, narrow, size.width, size.height]);
  const order = useMemo(() => tabOrder(l, direction), [l, direction]);
  const [focused, setFocused] = useState<Focus | undefined>(undefined);
  const q = place.value.query;
  const find = (q.get("find") ?? "").toLowerCase();
  const selected = q.get("sel") ?? "";
  const selectedIndex = g.nodes.findIndex((n) => nodeKey(n) === selected);

  useLayoutEffect(() => {
    const host = stage.current;
    if (!host) return;
    const observer = new ResizeObserver(() => setSize({ width: host.clientWidth, height: host.clientHeight }));
    observer.observe(host);
    setSize({ width: host.clientWidth, height: host.clientHeight });
    return () => observer.disconnect();
  }, []);

  // On a narrow screen the stage is as high as the drawing, so only the width counts.
  const fitted = size.width > 0 ? Math.min(1.15, Math.max(0.6, Math.min((size.width - 4) / l.width, narrow ? Infinity : (size.height - 4) / l.height))) : 1;
  const scale = fitted * zoom;
  const near = (i: number): boolean => selectedIndex < 0 || i === selectedIndex || g.edges.some((e) => (e.source === selectedIndex && e.target === i) || (e.target === selectedIndex && e.source === i));
  const matches = (n: GraphNode): boolean => find === "" || n.name.toLowerCase().includes(find) || (n.namespace ?? "").toLowerCase().includes(find);

  const elementOf = (f: Focus): SVGGElement | null | undefined => svg.current?.querySelector<SVGGElement>("node" in f ? `[data-node="${f.node}"]` : `[data-edge="${f.edge}"]`);
  const openNode = (n: GraphNode) => {
    if (n.kind === "namespace") set({ open: [...q.getAll("open"), n.name] });
    else if (n.kind !== "rest") set({ sel: nodeKey(n) === selected ? undefined : nodeKey(n) });
  };
  const openEdge = (e: GraphEdge) => {
    const to = edgePath(g, e);
    if (to) go(placeOf(place.peek(), to.path, { kind: to.kind }));
  };
  const keys = (e: KeyboardEvent) => {
    if (!focused) return;
    if (e.key === "Enter" || e.key === " ") {
      e.preventDefault();
      if ("node" in focused) openNode(g.nodes[focused.node]!);
      else openEdge(g.edges[focused.edge]!);
      return;
    }
    if (e.key === "Escape" && selected) return set({ sel: undefined });
    const next = move(g, l, focused, e.key);
    if (next) {
      e.preventDefault();
      elementOf(next)?.focus();
    }
  };
  // Dragging moves the drawing; wheel with Ctrl and pinches zoom.
  const drag = useRef<{ x: number; y: number; left: number; top: number } | undefined>(undefined);
  useEffect(() => {
    const host = stage.current;
    if (!host) return;
    const wheel = (e: WheelEvent) => {
      if (!e.ctrlKey) return;
      e.preventDefault();
      setZoom((z) => Math.min(4, Math.max(0.4, z * Math.exp(-e.deltaY / 300))));
    };
    host.addEventListener("wheel", wheel, { passive: false });
    return () => host.removeEventListener("wheel", wheel);
  }, []);

  return (
    <div class={`graph ${selectedIndex >= 0 ? "with-side" : ""}`}>
      <div
        class="stage" ref={stage}
        onPointerDown={(e) => {
          if (e.pointerType !== "mouse" || e.button !== 0 || (e.target as Element).closest("[data-node],.edge")) return;
          drag.current = { x: e.clientX, y: e.clientY, left: e.currentTarget.scrollLeft, top: e.currentTarget.scrollTop };
          e.currentTarget.setPointerCapture(e.pointerId);
        }}
        onPointerMove={(e) => {
          if (!drag.current) return;
          e.currentTarget.scrollLeft = drag.current.left - (e.clientX - drag.current.x);
          e.currentTarget.scrollTop = drag.current.top - (e.clientY - drag.current.y);
        }}
        onPointerUp={() => { drag.current = undefined; }}
      >
        {size.width > 0 && (
          <svg
            ref={svg} class="drawing" viewBox={`0 0 ${l.width} ${l.height}`} width={l.width * scale} height={l.height * scale} role="group"
            aria-label={`Service graph: ${count(g.nodes.length, "node", "nodes")}, ${count(g.edges.length, "connection", "connections")}. Tab goes from node to node, arrow keys along the calls, Enter opens.`}
            onKeyDown={keys}
          >
            <defs>
              {["ok", "warn", "bad", "idle"].map((h) => (
                <marker key={h} id={`arrow-${h}`} class={`arrow ${h}`} viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 .5L8 4 0 7.5z" /></marker>
              ))}
            </defs>
            <g>
              {l.edges.map(({ index, path, label }) => {
                const e = g.edges[index]!, h = edgeHealth(e);
                const faded = (selectedIndex >= 0 && e.source !== selectedIndex && e.target !== selectedIndex) || (find !== "" && !matches(g.nodes[e.source]!) && !matches(g.nodes[e.target]!));
                return (
                  <g key={index} class={`edge ${h} ${edgePattern(e)} ${faded ? "faded" : ""}`}>
                    <g data-edge={index} tabindex={-1} role="link" aria-label={edgeSentence(g, e)} onClick={() => openEdge(e)} onFocus={() => setFocused({ edge: index })}>
                      <title>{edgeSentence(g, e)}</title>
                      <path class="hit" d={path} />
                      <path class="line" d={path} style={{ strokeWidth: edgeWidth(e) }} marker-end={`url(#arrow-${h})`} />
                    </g>
                    <Label edge={e} at={label} onOpen={() => openEdge(e)} />
                  </g>
                );
              })}
            </g>
            <g>
              {order.map((i) => <Node key={nodeKey(g.nodes[i]!)} graph={g} layout={l} index={i} selected={i === selectedIndex} faded={!near(i) || !matches(g.nodes[i]!)} onOpen={openNode} onFocus={() => setFocused({ node: i })} />)}
            </g>
          </svg>
        )}
      </div>
      <div class="zoom" role="group" aria-label="Size">
        <button type="button" class="icon-button" aria-label="Larger" onClick={() => setZoom(Math.min(4, zoom * 1.3))}><Icon name="plus" /></button>
        <button type="button" class="icon-button" aria-label="Smaller" onClick={() => setZoom(Math.max(0.4, zoom / 1.3))}><Icon name="minus" /></button>
        <button type="button" class="icon-button" aria-label="Fit" onClick={() => setZoom(1)}><Icon name="fit" /></button>
      </div>
      <Legend />
      {selectedIndex >= 0 && <Side graph={g} index={selectedIndex} />}
    </div>
  );
}

/** The numbers of an edge. Who cannot see them has them in its sentence. */
function Label({ edge: e, at, onOpen }: { edge: GraphEdge; at: { x: number; y: number; width: number; height: number; lines: string[] }; onOpen: () => void }) {
  const left = at.x - at.width / 2, top = at.y - at.height / 2;
  return (
    <g class="label" aria-hidden="true" onClick={onOpen}>
      <rect x={left} y={top} width={at.width} height={at.height} rx="5" />
      <path class={`lock ${e.security}`} transform={`translate(${left + 4} ${top + 4}) scale(.72)`} d={iconPath(lockOf[e.security])} />
      {at.lines.map((text, i) => <text key={text} class={i > 0 && e.errors > 0 && text.endsWith("errors") ? "errors" : ""} x={left + 18} y={top + 13.5 + i * 14}>{text}</text>)}
    </g>
  );
}

function Node({ graph: g, layout: l, index, selected, faded, onOpen, onFocus }: { graph: Graph; layout: Layout; index: number; selected: boolean; faded: boolean; onOpen: (n: GraphNode) => void; onFocus: () => void }) {
  const n = g.nodes[index]!, at = l.nodes[index]!, h = nodeHealth(n);
  const x = at.x - at.width / 2, y = at.y - at.height / 2;
  const sentence = nodeSentence(g, index);
  return (
    <g class={`node ${n.kind} ${h} ${faded ? "faded" : ""}`}>
      <g data-node={index} tabindex={0} role="button" aria-label={sentence} aria-pressed={n.kind === "namespace" || n.kind === "rest" ? undefined : selected} onClick={() => onOpen(n)} onFocus={onFocus}>
        <title>{sentence}</title>
        <rect class="body" x={x} y={y} width={at.width} height={at.height} rx="8" />
      </g>
      <g class="texts" aria-hidden="true">
        {(n.kind === "namespace" || n.kind === "rest") && <rect class="stack" x={x + 3} y={y + 3} width={at.width - 6} height={at.height - 6} rx="6" />}
        <path class="glyph" transform={`translate(${x + 10} ${y + 10})`} d={iconPath(iconOf(n))} />
        <text class="name" x={x + 32} y={y + 19}>{fit(title(n), nodeLetters)}</text>
        <text class="namespace" x={x + 32} y={y + 34}>{fit(subtitle(n), nodeLetters + 2)}</text>
        {n.in > 0 && <text class="numbers" x={x + 32} y={y + 50}>{rate(n.in)}{n.inErrors > 0 && <tspan class="errors">{` · ${percent(n.inErrors / n.in)} errors`}</tspan>}</text>}
        {(n.problem || h === "warn" || h === "bad") && <g class="flag" transform={`translate(${x + at.width - 9} ${y - 7})`}><rect x="-2" y="-2" width="20" height="20" rx="10" /><path d={iconPath(h === "bad" ? "bad" : "warn")} /></g>}
      </g>
    </g>
  );
}

function Legend() {
  const line = (className: string) => <svg viewBox="0 0 30 8" width="30" height="8" aria-hidden="true" class={`edge ${className}`}><path class="line" d="M1 4H29" /></svg>;
  return (
    <ul class="legend" aria-label="Legend">
      <li>{line("ok solid")}HTTP, gRPC</li>
      <li>{line("ok dotted")}TCP</li>
      <li>{line("warn dashed")}1 % errors</li>
      <li>{line("bad dashed")}5 % errors</li>
      <li><Icon name="lock" size={12} />mutual TLS</li>
      <li><Icon name="unlock" size={12} />not encrypted</li>
    </ul>
  );
}

/** What is known about a node. */
function Side({ graph: g, index }: { graph: Graph; index: number }) {
  const n = g.nodes[index]!;
  const incoming = g.edges.filter((e) => e.target === index), outgoing = g.edges.filter((e) => e.source === index);
  return (
    <aside class="side-panel" aria-label={title(n)}>
      <header>
        <h2><Icon name={iconOf(n)} />{title(n)}</h2>
        <button type="button" class="icon-button" aria-label="Close" onClick={() => set({ sel: undefined })}><Icon name="close" /></button>
      </header>
      <p class="muted">{subtitle(n)}{n.services && n.services.length > 0 && n.kind === "workload" ? `, service ${n.services.join(", ")}` : ""}</p>
      {n.problem && <p><Badge level="warn">{n.problem}</Badge></p>}
      <dl class="facts">
        <dt>Receives</dt><dd>{rate(n.in)} <Errors rate={n.in} errors={n.inErrors} /></dd>
        {n.noRoute ? <><dt>No route</dt><dd>{rate(n.noRoute)} <span class="muted">answered by its own proxy: no route has their host and path</span></dd></> : null}
        <dt>Sends</dt><dd>{rate(n.out)} <Errors rate={n.out} errors={n.outErrors} /></dd>
      </dl>
      {n.kind === "workload" && n.namespace && (
        <p class="links">
          <Link to={["workloads", n.namespace, n.name]}>Workload</Link>
          <Link to={["logs"]} query={{ q: `{job="pods", namespace=${JSON.stringify(n.namespace)}, workload=${JSON.stringify(n.name)}}` }}>Logs</Link>
          <Link to={["graph"]} query={{ focus: n.name, "focus-ns": n.namespace }}>Only its neighbors</Link>
        </p>
      )}
      <Calls title="Called by" graph={g} edges={incoming} other="source" />
      <Calls title="Calls" graph={g} edges={outgoing} other="target" />
    </aside>
  );
}

function Calls({ title: heading, graph: g, edges, other }: { title: string; graph: Graph; edges: GraphEdge[]; other: "source" | "target" }) {
  if (edges.length === 0) return null;
  return (
    <>
      <h3>{heading}</h3>
      <ul class="calls">
        {edges.map((e) => {
          const to = edgePath(g, e), name = title(g.nodes[e[other]]!);
          return (
            <li key={`${e.source}-${e.target}`}>
              <Icon name={lockOf[e.security]} label={securityText(e)} size={12} />
              {to ? <Link to={to.path} query={{ kind: to.kind }}>{name}</Link> : <span>{name}</span>}
              <span class="numbers">{edgeLabel(e)[0]}</span>
              {e.rate > 0 && e.errors > 0 && <Errors rate={e.rate} errors={e.errors} />}
            </li>
          );
        })}
      </ul>
    </>
  );
}

export const edgeColumns = (g: Graph): Column<GraphEdge>[] => [
  { key: "from", title: "From", value: (e) => title(g.nodes[e.source]!), cell: (e) => <End node={g.nodes[e.source]!} /> },
  { key: "to", title: "To", value: (e) => title(g.nodes[e.target]!), cell: (e) => <End node={g.nodes[e.target]!} /> },
  { key: "protocol", title: "Protocol", value: (e) => e.protocols.join(" ") },
  { key: "rate", title: "Requests", number: true, value: (e) => e.rate, cell: (e) => (e.rate > 0 ? rate(e.rate) : e.tcp ? `${bytes(e.tcp.sent + e.tcp.received)}/s` : "–") },
  { key: "errors", title: "Errors", number: true, value: (e) => (e.rate > 0 ? e.errors / e.rate : 0), cell: (e) => <Errors rate={e.rate} errors={e.errors} /> },
  { key: "p50", title: "p50", number: true, value: (e) => e.p50, cell: (e) => (e.p50 === undefined ? "–" : ms(e.p50)) },
  { key: "p95", title: "p95", number: true, value: (e) => e.p95, cell: (e) => (e.p95 === undefined ? "–" : ms(e.p95)) },
  { key: "p99", title: "p99", number: true, value: (e) => e.p99, cell: (e) => (e.p99 === undefined ? "–" : ms(e.p99)) },
  { key: "security", title: "Security", value: (e) => securityText(e), cell: (e) => <span class={`security ${e.security}`}><Icon name={lockOf[e.security]} size={13} />{{ mtls: "mutual TLS", plain: "plain", mixed: "mixed", unknown: "unknown" }[e.security]}</span> },
  {
    key: "open", title: "Details", value: () => "", cell: (e) => {
      const to = edgePath(g, e);
      return to ? <Link to={to.path} query={{ kind: to.kind }} aria-label={`Open ${title(g.nodes[e.source]!)} to ${title(g.nodes[e.target]!)}`}>Open</Link> : "";
    },
  },
];

function End({ node: n }: { node: GraphNode }) {
  return (
    <span class="end">
      {n.kind === "workload" && n.namespace ? <Link to={["workloads", n.namespace, n.name]}>{n.name}</Link> : <span>{title(n)}</span>}
      <small>{subtitle(n)}</small>
    </span>
  );
}

function EdgeTable({ graph: g }: { graph: Graph }) {
  const find = (place.value.query.get("find") ?? "").toLowerCase();
  const rows = find === "" ? g.edges : g.edges.filter((e) => [g.nodes[e.source]!, g.nodes[e.target]!].some((n) => n.name.toLowerCase().includes(find) || (n.namespace ?? "").toLowerCase().includes(find)));
  return (
    <Panel>
      <Table columns={edgeColumns(g)} rows={rows} caption="Connections between workloads" id={(e) => `${e.source}-${e.target}`} sorted="-rate" rowClass={(e) => edgeHealth(e)} />
    </Panel>
  );
}

/** The drawing as a file of its own: the style sheet's colors are written into its elements. */
function exportSVG(from: SVGSVGElement | null): string | undefined {
  if (!from) return undefined;
  const copy = from.cloneNode(true) as SVGSVGElement;
  const live = [from, ...from.querySelectorAll<SVGElement>("*")], copies = [copy, ...copy.querySelectorAll<SVGElement>("*")];
  live.forEach((element, i) => {
    const style = getComputedStyle(element), to = copies[i]!;
    for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "font-family"]) {
      const value = style.getPropertyValue(name);
      if (value && value !== "normal") to.setAttribute(name, value);
    }
    for (const name of ["class", "style", "tabindex", "role", "data-node", "data-edge", "aria-pressed"]) to.removeAttribute(name);
  });
  copy.querySelectorAll("[fill='none'][stroke='none']").forEach((e) => e.remove());
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const background = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  background.setAttribute("width", "100%");
  background.setAttribute("height", "100%");
  background.setAttribute("fill", getComputedStyle(document.body).backgroundColor);
  copy.prepend(background);
  return new XMLSerializer().serializeToString(copy);
}

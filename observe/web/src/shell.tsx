// The frame of every view: navigation, search, time, namespaces, and the list of keys.
import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { api, useData, type WorkloadRow } from "./api";
import { span, when, zoneOf } from "./format";
import { Icon, type IconName } from "./icons";
import { filtersIn, go, keys, live, lost, now, place, set, setKeys, setTheme, shift, store, theme } from "./state";
import { Suggest, type Suggestion } from "./suggest";
import { Choice, Link, Menu, ViewLink } from "./ui";
import { endOf, placeOf, timeParam, timeQuery, windowOf, windows, windowWords } from "./url";
import { quote } from "./logs";

export const navigation: { path: string; text: string; icon: IconName; key: string }[] = [
  { path: "", text: "Overview", icon: "overview", key: "o" },
  { path: "graph", text: "Graph", icon: "graph", key: "g" },
  { path: "workloads", text: "Workloads", icon: "workloads", key: "w" },
  { path: "logs", text: "Logs", icon: "logs", key: "l" },
  { path: "traces", text: "Traces", icon: "traces", key: "t" },
  { path: "metrics", text: "Metrics", icon: "metrics", key: "m" },
  { path: "rollouts", text: "Rollouts", icon: "rollouts", key: "r" },
  { path: "events", text: "Events", icon: "events", key: "e" },
  { path: "nodes", text: "Nodes", icon: "nodes", key: "n" },
];

/** Which entry of the navigation a view belongs to. */
const section = (path: string[]): string => ({ edge: "graph", request: "traces", compare: "traces" })[path[0] ?? ""] ?? path[0] ?? "";

export function Shell({ children }: { children: ComponentChildren }) {
  const help = useRef<HTMLDialogElement>(null);
  useKeys(() => (help.current?.open ? help.current.close() : help.current?.showModal()));
  const at = section(place.value.path);
  return (
    <>
      <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); document.getElementById("main")?.focus(); }}>Skip to the view</a>
      <header class="top">
        <Link to={[]} class="brand">
          <svg viewBox="0 0 16 16" width="20" height="20" aria-hidden="true"><path d="M8 1l6 3.5v7L8 15l-6-3.5v-7z" /><g><circle cx="8" cy="5" r="1.6" /><circle cx="5" cy="10" r="1.6" /><circle cx="11" cy="10" r="1.6" /></g></svg>
          <span>Polymesh</span>
          {store.value?.name && <small>{store.value.name}</small>}
        </Link>
        <Search />
        <div class="controls">
          <Namespaces />
          <TimeControl />
          <Menu label="Colors" icon="theme" right>
            <Choice label="Colors" value={theme.value} onChange={setTheme} options={[{ value: "auto", text: "As the system" }, { value: "light", text: "Light" }, { value: "dark", text: "Dark" }]} />
          </Menu>
          <button type="button" class="icon-button" aria-label="Keys" title="Keys (?)" onClick={() => help.current?.showModal()}><Icon name="keyboard" /></button>
        </div>
      </header>
      <nav class="side" aria-label="Views">
        {navigation.map((n) => (
          <ViewLink key={n.path} view={n.path} aria-current={n.path === at ? "page" : undefined}>
            <Icon name={n.icon} />
            <span>{n.text}</span>
          </ViewLink>
        ))}
      </nav>
      <main id="main" tabIndex={-1}>
        <Banner />
        {children}
      </main>
      <Help dialog={help} />
    </>
  );
}

/** Says when what is shown is not what is happening now. */
function Banner() {
  const s = store.value;
  if (lost.value) return <div class="banner bad" role="alert"><Icon name="warn" />The store does not answer. What you see is from before.</div>;
  if (s?.offline) return <div class="banner note" role="status"><Icon name="clock" />These are recorded files. Nothing is recorded now.</div>;
  if (s && !s.reachable) {
    const since = s.since ? Date.parse(s.since) : NaN;
    return (
      <div class="banner bad" role="alert">
        <Icon name="warn" />
        The cluster is gone{Number.isFinite(since) ? ` since ${when(since, now())}` : ""}; you see what was recorded.
        {live.value && Number.isFinite(since) && <button type="button" onClick={() => set({ t: timeParam(since) })}>Show the time before</button>}
      </div>
    );
  }
  return null;
}

const uuid = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i, traceId = /^[0-9a-f]{16,32}$/i;

/** Finds a request by its id, a workload by its name, a view, or lines with a text. */
function Search() {
  const [text, setText] = useState("");
  const wanted = text.trim();
  const [asked, setAsked] = useState(false);
  const { data } = useData<{ workloads: WorkloadRow[] }>(asked ? api("workloads", timeQuery(place.value.query)) : undefined, false);
  const to = (path: string[], query?: Record<string, string>) => () => {
    setText("");
    go(placeOf(place.peek(), path, query));
  };
  const suggestions = useMemo(() => {
    if (!wanted) return [];
    const list: Suggestion[] = [];
    if (uuid.test(wanted) || traceId.test(wanted)) list.push({ id: "request", text: <>Request <code>{wanted}</code></>, apply: to(["request", wanted.toLowerCase()]) });
    const w = wanted.toLowerCase();
    for (const n of navigation) if (n.text.toLowerCase().startsWith(w)) list.push({ id: "view" + n.path, text: n.text, detail: "view", apply: to(n.path ? [n.path] : []) });
    for (const x of (data?.workloads ?? []).filter((x) => x.name.toLowerCase().includes(w) || `${x.namespace}/${x.name}`.toLowerCase().includes(w)).slice(0, 8)) {
      list.push({ id: JSON.stringify([x.kind, x.namespace, x.name]), text: x.name, detail: `${x.kind}, ${x.namespace}`, apply: to(["workloads", x.namespace, x.name]) });
    }
    list.push({ id: "logs", text: <>Logs with <code>{wanted}</code></>, apply: to(["logs"], { q: `{job="pods"} |= ${quote(wanted)}` }) });
    if (wanted.startsWith("/")) list.push({ id: "traces", text: <>Traces with the path <code>{wanted}</code></>, apply: to(["traces"], { path: wanted }) });
    return list;
  }, [wanted, data]);
  return (
    <search>
      <Icon name="search" />
      <Suggest
        label="Search: a request id, a trace id, a workload, or a text in logs" placeholder="Request id, workload, text…" value={text} inputId="search" suggestions={suggestions}
        onInput={(t) => { setText(t); setAsked(true); }}
        onEnter={() => suggestions[0]?.apply()}
      />
      <kbd aria-hidden="true">/</kbd>
    </search>
  );
}

/** Which namespaces are shown. */
function Namespaces() {
  const chosen = place.value.query.getAll("ns");
  const text = chosen.length === 0 ? "All namespaces" : chosen.length === 1 ? chosen[0]! : `${chosen.length} namespaces`;
  return (
    <Menu label={`Namespaces: ${text}`} icon="namespace" text={<span class="value">{text}</span>} class="namespaces" right>
      <NamespaceList chosen={chosen} />
    </Menu>
  );
}

function NamespaceList({ chosen }: { chosen: string[] }) {
  const q = timeQuery(place.value.query);
  const end = Number(q.get("end") ?? now()), { ms } = windowOf(place.value.query);
  const url = useMemo(() => `/api/v1/label/namespace/values?${new URLSearchParams([["start", String((end - ms) / 1000)], ["end", String(end / 1000)], ["match[]", "kube_pod_info"], ["match[]", "istio_requests_total"]])}`, []);
  const { data, error } = useData<{ data: string[] }>(url, false);
  const [find, setFind] = useState("");
  const names = [...new Set([...chosen, ...(data?.data ?? [])])].sort();
  const shown = names.filter((n) => n.includes(find)).slice(0, 200);
  const toggle = (name: string) => set({ ns: chosen.includes(name) ? chosen.filter((n) => n !== name) : [...chosen, name] });
  return (
    <fieldset class="checks">
      <legend>Namespaces</legend>
      {names.length > 8 && <input type="search" aria-label="Find a namespace" placeholder="Find" value={find} onInput={(e) => setFind(e.currentTarget.value)} />}
      {error && <p class="muted">{error.message}</p>}
      <div>
        {shown.map((name) => (
          <label key={name}>
            <input type="checkbox" checked={chosen.includes(name)} onChange={() => toggle(name)} />
            <span>{name}</span>
          </label>
        ))}
        {data && shown.length === 0 && <p class="muted">There is none.</p>}
      </div>
      {chosen.length > 0 && <button type="button" onClick={() => set({ ns: undefined })}>All namespaces</button>}
    </fieldset>
  );
}

function TimeControl() {
  const q = place.value.query;
  const end = endOf(q), w = windowOf(q);
  const word = windowWords[w.text] ?? span(w.ms);
  const text = end === undefined ? `Last ${word}` : `${when(end - w.ms, now())} – ${when(end, end - w.ms)}`;
  const local = (t: number) => {
    const d = new Date(t - new Date(t).getTimezoneOffset() * 60_000);
    return d.toISOString().slice(0, 19);
  };
  return (
    <div class="time">
      <button type="button" class="icon-button" aria-label="Earlier" title="Earlier ([)" onClick={() => shift(-0.5)}><Icon name="left" /></button>
      <Menu label={`Time: ${text}`} icon={end === undefined ? undefined : "clock"} text={<><i class={end === undefined ? "dot" : ""} aria-hidden="true" /><span class="value">{text}</span></>} right>
        {(close) => (
          <div class="times">
            <div role="group" aria-label="Length">
              {windows.map((v) => (
                <button key={v} type="button" aria-pressed={v === w.text} onClick={() => { set({ w: v }); close(); }}>{v}</button>
              ))}
            </div>
            <label class="field">
              <span>Until, {zoneOf(end ?? now())}</span>
              <input
                type="datetime-local" step="1" value={local(end ?? now())} max={local(now())}
                onChange={(e) => {
                  const t = new Date(e.currentTarget.value).getTime();
                  if (Number.isFinite(t)) set({ t: timeParam(t) });
                }}
              />
            </label>
            <button type="button" disabled={end === undefined} onClick={() => { set({ t: undefined }); close(); }}>Live</button>
          </div>
        )}
      </Menu>
      <button type="button" class="icon-button" aria-label="Later" title="Later (])" disabled={end === undefined} onClick={() => shift(0.5)}><Icon name="right" /></button>
    </div>
  );
}

/** Keys, each in a box of its own, and the words between them. */
const keyList: [string, string][] = [
  ["/", "search"],
  ["g then " + navigation.map((n) => n.key).join(" "), "go to a view: " + navigation.map((n) => n.text.toLowerCase()).join(", ")],
  ["[ and ]", "earlier and later by half of the shown time"],
  [".", "live"],
  ["- and +", "a longer and a shorter time"],
  ["v", "graph or table"],
  ["Tab", "in the graph: from workload to workload"],
  ["arrows", "in the graph: right and left along the calls, up and down to what is next to it; in the waterfall: up and down, open and close"],
  ["Enter", "open what has the focus"],
  ["Esc", "close a box, leave a field"],
  ["?", "this list"],
];

const keyWords = ["then", "and", "or"];

function Help({ dialog }: { dialog: { current: HTMLDialogElement | null } }) {
  return (
    <dialog ref={dialog} aria-labelledby="help" onClick={(e) => { if (e.target === dialog.current) dialog.current?.close(); }}>
      <header>
        <h2 id="help">Keys</h2>
        <button type="button" class="icon-button" aria-label="Close" onClick={() => dialog.current?.close()}><Icon name="close" /></button>
      </header>
      <dl class="keys">
        {keyList.map(([key, what]) => (
          <div key={key}>
            <dt>{key.split(" ").map((k, i) => (keyWords.includes(k) ? <span key={i}>{k}</span> : <kbd key={i}>{k}</kbd>))}</dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
      <label class="flag">
        <input type="checkbox" checked={keys.value} onChange={(e) => setKeys(e.currentTarget.checked)} />
        Single keys do something
      </label>
    </dialog>
  );
}

/** Listens for keys of the whole page. */
function useKeys(help: () => void): void {
  useEffect(() => {
    let leader = 0;
    const listen = (e: KeyboardEvent) => {
      const target = e.target as HTMLElement;
      if (e.ctrlKey || e.metaKey || e.altKey || e.defaultPrevented || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) || target.isContentEditable) return;
      if (e.key === "?") return help();
      if (!keys.peek() || document.querySelector("dialog[open]")) return;
      if (Date.now() - leader < 1200) {
        leader = 0;
        const n = navigation.find((x) => x.key === e.key);
        if (n) {
          e.preventDefault();
          return go(placeOf(place.peek(), n.path ? [n.path] : [], filtersIn(n.path)));
        }
      }
      const i = windows.indexOf(windowOf(place.peek().query).text);
      switch (e.key) {
        case "/":
          e.preventDefault();
          return document.getElementById("search")?.focus();
        case "g":
          leader = Date.now();
          return;
        case "[":
          return shift(-0.5);
        case "]":
          return live.peek() ? undefined : shift(0.5);
        case ".":
          return set({ t: undefined });
        case "-":
          return set({ w: windows[Math.min(windows.length - 1, i + 1)] });
        case "+":
          return set({ w: windows[Math.max(0, i - 1)] });
        case "v":
          if (place.peek().path[0] === "graph") set({ view: place.peek().query.get("view") === "table" ? undefined : "table" });
      }
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}

// Requests to the store, and the shapes of its answers.
import { useEffect, useRef, useState } from "preact/hooks";
import { tick } from "./state";
import type { Span } from "./waterfall";

export class Failure extends Error {
  constructor(readonly status: number, message: string) {
    super(message);
  }
}

/** Gets JSON. Errors have the words of the store. */
export async function get<T>(url: string, signal?: AbortSignal): Promise<T> {
  let response: Response;
  try {
    response = await fetch(url, signal ? { signal } : {});
  } catch (e) {
    if (signal?.aborted) throw e;
    throw new Failure(0, "The store does not answer. It may be starting, or the command that shows this page has ended.");
  }
  const text = await response.text();
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    body = undefined;
  }
  if (!response.ok) {
    const said = body && typeof body === "object" && "error" in body && typeof body.error === "string" ? body.error : text.slice(0, 500);
    if (response.status === 401 || response.status === 403) throw new Failure(response.status, "You may not read this. " + said);
    throw new Failure(response.status, said || response.statusText);
  }
  return body as T;
}

export interface Data<T> {
  data: T | undefined;
  error: Failure | undefined;
  loading: boolean;
}

/** The answer of a URL. While the next one is on its way the one before stays; every tick it is asked again, if refreshing. */
export function useData<T>(url: string | undefined, refreshing = true): Data<T> {
  const [state, setState] = useState<Data<T>>({ data: undefined, error: undefined, loading: url !== undefined });
  const count = refreshing ? tick.value : 0;
  const last = useRef<string | undefined>(undefined);
  useEffect(() => {
    if (url === undefined) return;
    const abort = new AbortController();
    const again = last.current === url;
    last.current = url;
    if (!again) setState((s) => ({ ...s, loading: true }));
    get<T>(url, abort.signal).then(
      (data) => setState({ data, error: undefined, loading: false }),
      (e: unknown) => {
        if (abort.signal.aborted) return;
        const error = e instanceof Failure ? e : new Failure(0, String(e));
        // What was there is better than nothing, if only the refresh failed.
        setState((s) => ({ data: again && error.status !== 404 ? s.data : undefined, error, loading: false }));
      },
    );
    return () => abort.abort();
  }, [url, count]);
  return state;
}

export const api = (path: string, query?: URLSearchParams): string => `/api/polymesh/v1/${path}${query && query.size > 0 ? "?" + query.toString() : ""}`;

export interface Line {
  labels?: Record<string, string>;
  points: [number, number][];
}

export interface Mark {
  time: number;
  kind: "deploy" | "rollout" | "restart" | "oom" | "evict" | "node";
  namespace?: string;
  workload?: string;
  text: string;
}

export interface Statement {
  level: "bad" | "warn" | "note";
  text: string;
  why?: string;
  advice?: string;
  since?: number;
  earlier?: boolean;
  once?: boolean;
  link?: string;
}

export interface Overview {
  start: number;
  end: number;
  verdict: "bad" | "warn" | "note";
  recorded: boolean;
  statements: Statement[];
  numbers: {
    workloads: number;
    readyWorkloads: number;
    pods: number;
    readyPods: number;
    nodes: number;
    readyNodes: number;
    rate: number;
    errors: number;
    p99?: number;
    calls: number;
    mutualTLS: number;
    knownSecurity: number;
  };
  rates: Line[];
  quantiles: Line[];
  changes: Mark[];
}

export interface Extent {
  start: number;
  end: number;
  requests: Line[];
  errors: Line[];
  unknown?: string;
}

export interface Access {
  start?: string;
  method?: string;
  path?: string;
  protocol?: string;
  code: number;
  flags?: string;
  meaning?: string;
  details?: string;
  failure?: string;
  received: number;
  sent: number;
  duration: number;
  userAgent?: string;
  requestId?: string;
  authority?: string;
  upstreamHost?: string;
  upstreamCluster?: string;
  remote?: string;
  route?: string;
  direction?: string;
  service?: string;
}

export interface RequestEntry extends Access {
  time: number;
  namespace: string;
  workload: string;
  pod: string;
}

export interface RequestLine {
  time: number;
  namespace: string;
  workload: string;
  pod: string;
  container: string;
  stream?: string;
  line: string;
  access?: Access;
  bar?: string;
}

export interface RequestAnswer {
  id: string;
  requests: string[];
  traces: string[];
  bars: Span[];
  fromLogs: boolean;
  lines: RequestLine[];
  more: boolean;
  incomplete?: string;
}

export interface TraceSummary {
  id: string;
  requestId?: string;
  start: number;
  duration: number;
  service: string;
  name: string;
  method?: string;
  path?: string;
  code?: string;
  spans: number;
  errors: number;
  services: { name: string; spans: number; errors: number }[];
}

export interface TraceAnswer extends TraceSummary {
  bars: Span[];
  incomplete?: string;
}

export interface Problem {
  text: string;
  why?: string;
  since?: string;
}

export interface WorkloadRow {
  kind: string;
  namespace: string;
  name: string;
  replicas: number;
  ready: number;
  images: string[];
  created?: number;
  restarts: number;
  cpu: number;
  memory: number;
  cpuNearest?: Nearest;
  memoryNearest?: Nearest;
  rate: number;
  errors: number;
  sent: number;
  problem?: Problem;
}

/** The container that uses the largest share of its limit. */
export interface Nearest {
  pod: string;
  container: string;
  use: number;
  limit: number;
}

export interface Container {
  name: string;
  image?: string;
  ready: boolean;
  restarts: number;
  state: string;
  reason?: string;
  message?: string;
  exitCode?: number;
  since?: string;
  last?: { reason?: string; exitCode: number; finished?: string };
}

export interface Pod {
  name: string;
  uid: string;
  node?: string;
  ip?: string;
  phase: string;
  reason?: string;
  message?: string;
  created?: string;
  started?: string;
  deleting?: string;
  owner?: string;
  revision?: string;
  ready: boolean;
  containers?: Container[];
  firstSeen: number;
  lastSeen: number;
  gone: boolean;
  restarts: number;
  images: string[];
  why?: string;
}

export interface RolloutMeasure {
  requests?: number;
  errorRate?: number;
  p99?: string | number;
}

export interface Rollout {
  name: string;
  namespace: string;
  container: string;
  image: string;
  previous: string;
  plan: { steps: number[]; interval: string; maxErrorRate: number; maxP99: string; minRequests: number; timeout: string };
  started: string;
  phase: string;
  step: number;
  weight: number;
  reason?: string;
  done?: { weight: number; canary: RolloutMeasure; stable: RolloutMeasure }[];
  ended?: string;
  final?: string;
}

export interface ClusterEvent {
  time: number;
  namespace?: string;
  workload?: string;
  kind?: string;
  name?: string;
  reason?: string;
  warning?: boolean;
  count?: number;
  source?: string;
  text: string;
}

/** What a container requests of a resource, and may use. */
export interface Resource {
  container: string;
  resource: string;
  request?: number;
  limit?: number;
}

export interface WorkloadAnswer {
  start: number;
  end: number;
  state: {
    kind: string;
    namespace: string;
    name: string;
    created?: string;
    deleted?: string;
    revision?: string;
    replicas: number;
    ready: number;
    updated: number;
    conditions?: { type: string; status: string; reason?: string; message?: string; since?: string }[];
    containers?: { name: string; image: string }[];
  };
  problem?: Problem;
  findings: { reason: string; kind: string; namespace?: string; name: string; pod?: string; container?: string; message: string; advice: string }[];
  pods: Pod[];
  revisions: { time: number; revision?: string; images: string[] }[];
  cut?: boolean;
  /** By pod and container, of the newest pods, as many as are measured. */
  cpu: Line[];
  memory: Line[];
  measured: number;
  resources: Resource[];
  /** The requests are those that it sends. */
  sends?: boolean;
  rates: Line[];
  quantiles: Line[];
  events: ClusterEvent[];
  rollouts: Rollout[];
}

export interface Trigger {
  id: "cpu" | "memory" | "pending" | "evicted" | "apiserver";
  firing: boolean;
  since?: number;
  /** It may have begun before since. */
  earlier?: boolean;
  value: number;
  limit: number;
  known: boolean;
  lines: Line[];
  about: string[];
}

export interface NodeRow {
  name: string;
  ready: boolean;
  known: boolean;
  since?: number;
  earlier?: boolean;
  pressure: string[];
  version?: string;
  kernel?: string;
  os?: string;
  address?: string;
  cordoned?: boolean;
  pods: number;
  maxPods?: number;
  cpus?: number;
  cpu?: number;
  memory?: number;
  bytes?: number;
  disk?: number;
}

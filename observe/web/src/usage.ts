// What the containers of a workload use, request and may use. This file has no effects.
import type { Line, Resource } from "./api";
import type { Limit } from "./points";

export interface Used {
  /** The pod without the name of its workload, and the container if there are several. */
  label: string;
  /** Pods and containers are counted: one has a color, the other a kind of line. */
  pod: number;
  container: number;
  points: [number, number][];
}

/** The lines of an answer by pod and container. */
export function usedBy(lines: Line[], workload: string): Used[] {
  const pods = [...new Set(lines.map((l) => l.labels?.pod ?? ""))].sort(), containers = [...new Set(lines.map((l) => l.labels?.container ?? ""))].sort((a, b) => Number(a === "istio-proxy") - Number(b === "istio-proxy") || (a < b ? -1 : 1));
  return lines.map((l) => {
    const pod = l.labels?.pod ?? "", container = l.labels?.container ?? "";
    const short = pod.startsWith(workload + "-") ? pod.slice(workload.length + 1) : pod;
    return { label: containers.length > 1 ? `${short} ${container}` : short, pod: pods.indexOf(pod), container: containers.indexOf(container), points: l.points };
  }).sort((a, b) => a.pod - b.pod || a.container - b.container);
}

/** The amounts of one resource that containers request, or may use: each names its containers, as those without one have none. */
export function amounts(resources: Resource[], resource: string, what: "request" | "limit"): Limit[] {
  const names = new Map<number, string[]>();
  for (const r of resources) {
    const value = r[what];
    if (r.resource !== resource || !value) continue;
    const list = names.get(value);
    if (list) list.push(r.container);
    else names.set(value, [r.container]);
  }
  return [...names].sort(([a], [b]) => a - b).map(([value, list]) => ({ value, label: `${what} of ${list.sort().join(", ")}` }));
}

/** What the containers of a pod request, or may use, together, and which containers these are. */
export function sumOf(resources: Resource[], resource: string, what: "request" | "limit"): { value: number; containers: string[] } {
  const some = resources.filter((r) => r.resource === resource && r[what]);
  return { value: some.reduce((n, r) => n + r[what]!, 0), containers: some.map((r) => r.container) };
}

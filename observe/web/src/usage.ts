// What the containers of a workload use and may use, and what it sends. This file has no effects.
import type { Line } from "./api";
import type { Limit } from "./points";

const escape = (text: string) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** Of more pods than these a chart is not read any more. */
export const mostPods = 40;

/** PromQL queries of the containers of pods, by pod and container. The newest pods come first. */
export function usageQueries(namespace: string, pods: string[], stepSeconds: number): { cpu: string; memory: string; limits: string } {
  const of = `{namespace=${JSON.stringify(namespace)}, pod=~${JSON.stringify(pods.slice(0, mostPods).map(escape).join("|"))}}`;
  return {
    cpu: `sum by (pod, container) (rate(container_cpu_usage_seconds_total${of}[${Math.max(2 * stepSeconds, 120)}s]))`,
    memory: `sum by (pod, container) (container_memory_working_set_bytes${of})`,
    limits: `max by (container, resource) (kube_pod_container_resource_limits${of})`,
  };
}

/** The PromQL query of the requests per second that a workload sends, by the class of their code. */
export function sentQuery(namespace: string, name: string, stepSeconds: number): string {
  const of = `{reporter="source", source_workload_namespace=${JSON.stringify(namespace)}, source_workload=${JSON.stringify(name)}}`;
  return `sum by (class) (label_replace(rate(istio_requests_total${of}[${Math.max(4 * stepSeconds, 60)}s]), "class", "${"${1}"}xx", "response_code", "(.).*"))`;
}

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

/** The limits of containers of one resource: each names its containers, as those without one have none. */
export function containerLimits(values: { labels: Record<string, string>; value: number }[], resource: string): Limit[] {
  const names = new Map<number, string[]>();
  for (const v of values) {
    if (v.labels.resource !== resource || !(v.value > 0)) continue;
    const list = names.get(v.value);
    if (list) list.push(v.labels.container ?? "");
    else names.set(v.value, [v.labels.container ?? ""]);
  }
  return [...names].sort(([a], [b]) => a - b).map(([value, list]) => ({ value, label: `limit of ${list.sort().join(", ")}` }));
}

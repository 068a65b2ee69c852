// PromQL queries that a click asks. They name the store's own jobs: a job of a user may read the same numbers once more, and every sum would double.
// This file has no effects.

/** The five metrics of Istio that the guide names, and three more that are asked for often. */
export const prepared: { text: string; query: string }[] = [
  { text: "Requests", query: 'sum by (destination_workload) (rate(istio_requests_total{job="istio-proxy", reporter="destination"}[5m]))' },
  { text: "Duration, p99", query: 'histogram_quantile(0.99, sum by (le, destination_workload) (rate(istio_request_duration_milliseconds_bucket{job="istio-proxy", reporter="destination"}[5m])))' },
  { text: "Request bytes", query: 'sum by (destination_workload) (rate(istio_request_bytes_sum{job="istio-proxy", reporter="destination"}[5m]))' },
  { text: "Response bytes", query: 'sum by (destination_workload) (rate(istio_response_bytes_sum{job="istio-proxy", reporter="destination"}[5m]))' },
  { text: "TCP connections", query: 'sum by (destination_workload) (rate(istio_tcp_connections_opened_total{job="istio-proxy", reporter="destination"}[5m]))' },
  { text: "Errors", query: 'sum by (destination_workload) (rate(istio_requests_total{job="istio-proxy", reporter="destination", response_code=~"5.."}[5m])) / sum by (destination_workload) (rate(istio_requests_total{job="istio-proxy", reporter="destination"}[5m]))' },
  { text: "CPU by pod", query: 'topk(10, sum by (namespace, pod) (rate(container_cpu_usage_seconds_total{job="kubelet"}[5m])))' },
  { text: "Memory by pod", query: 'topk(10, sum by (namespace, pod) (container_memory_working_set_bytes{job="kubelet"}))' },
];

/** The query of the pods that use the most CPU or memory of a node. */
export function podsOf(node: string, resource: "cpu" | "memory"): string {
  const of = `{job="kubelet", node=${JSON.stringify(node)}}`;
  return `topk(10, sum by (namespace, pod) (${resource === "cpu" ? `rate(container_cpu_usage_seconds_total${of}[5m])` : `container_memory_working_set_bytes${of}`}))`;
}

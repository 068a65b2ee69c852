// The trace that a request belongs to. The sidecars make the spans; an app has to pass on what they wrote into the request.

const PASSED_ON = [
  "traceparent", "tracestate", "x-request-id", "b3",
  "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
];

// traceHeaders are those of a request's headers that a call made for it has to carry.
export function traceHeaders(headers) {
  return Object.fromEntries(PASSED_ON.filter((name) => headers[name]).map((name) => [name, headers[name]]));
}

// traceOf is the trace in W3C's header or in B3's; empty without one.
export function traceOf(headers) {
  const parts = (headers.traceparent ?? "").split("-");
  if (parts.length === 4) return { id: parts[1], span: parts[2] };
  return { id: headers["x-b3-traceid"] ?? "", span: headers["x-b3-spanid"] ?? "" };
}

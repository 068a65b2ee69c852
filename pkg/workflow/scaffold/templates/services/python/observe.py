"""The trace of a request, metrics for Prometheus, and log lines as JSON with the fields that the services of all languages have."""

import json
import logging
import time
from collections.abc import Mapping
from datetime import datetime, timezone

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

# The sidecars make the spans and write them into these headers. Only the app knows which call belongs to which request,
# so a call that is made for a request carries them.
PASSED_ON = (
    "traceparent", "tracestate", "x-request-id", "b3",
    "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
)

# What asks for these are machines, every few seconds: neither logged nor counted.
QUIET = {"/health", "/ready", "/metrics"}

log = logging.getLogger("service")


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in PASSED_ON if name in headers}


def trace_of(headers: Mapping[str, str]) -> tuple[str, str]:
    """The trace and span in W3C's header or in B3's; empty without one."""
    parts = headers.get("traceparent", "").split("-")
    if len(parts) == 4:
        return parts[1], parts[2]
    return headers.get("x-b3-traceid", ""), headers.get("x-b3-spanid", "")


class JSONFormatter(logging.Formatter):
    def __init__(self, service: str):
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self.service,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def add_to(app: FastAPI, service: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter(service))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    registry = CollectorRegistry()
    requests = Counter("http_requests", "Requests that were answered", ["method", "path", "status"], registry=registry)
    duration = Histogram("http_request_duration_seconds", "Time until the answer", ["method", "path"], registry=registry)

    @app.middleware("http")
    async def observe(request: Request, call_next) -> Response:
        if request.url.path in QUIET:
            return await call_next(request)
        start = time.perf_counter()
        status = 500  # of an exception that nobody handles
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            took = time.perf_counter() - start
            # The path of the route: what clients make up would be metrics without end.
            path = getattr(request.scope.get("route"), "path", "")
            requests.labels(request.method, path, str(status)).inc()
            duration.labels(request.method, path).observe(took)
            trace_id, span_id = trace_of(request.headers)
            log.info("request", extra={"fields": {
                "method": request.method, "path": path, "status": status, "duration_ms": round(took * 1000, 3),
                "trace_id": trace_id, "span_id": span_id, "request_id": request.headers.get("x-request-id", ""),
            }})

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

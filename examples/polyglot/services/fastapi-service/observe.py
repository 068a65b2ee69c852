"""Metrics for Prometheus, and log lines as JSON with the fields that the services of all languages have."""

import json
import logging
import time
from datetime import datetime, timezone

from fastapi import FastAPI, Request, Response
from opentelemetry import trace
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest

import tracing
from chain import SERVICE, trace_of

# What asks for these are machines, every few seconds: neither logged nor counted.
QUIET = {"/health", "/ready", "/metrics"}

REQUESTS = Counter("http_requests", "Requests that were answered", ["method", "path", "status"])
DURATION = Histogram("http_request_duration_seconds", "Time until the answer", ["method", "path"])

log = logging.getLogger("service")


class JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": SERVICE,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json() -> None:
    """Sends all logs to one place. uvicorn has set up its own before it imports the app."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # observe has a line for each request
    logging.getLogger("httpx").setLevel(logging.WARNING)


async def observe(request: Request, call_next) -> Response:
    if request.url.path in QUIET:
        return await call_next(request)
    start = time.perf_counter()
    span = tracing.start(request.app.state.tracing, request)
    status = 500  # of an exception that nobody handles
    try:
        with trace.use_span(span):
            response = await call_next(request)
        status = response.status_code
        return response
    finally:
        took = time.perf_counter() - start
        # The path of the route: what clients make up would be metrics without end.
        path = getattr(request.scope.get("route"), "path", "")
        REQUESTS.labels(request.method, path, str(status)).inc()
        DURATION.labels(request.method, path).observe(took)
        tracing.end(span, request.method, path, status)
        trace_id, span_id = trace_of(request.headers)
        log.info("request", extra={"fields": {
            "method": request.method, "path": path, "status": status, "duration_ms": round(took * 1000, 3),
            "trace_id": trace_id, "span_id": span_id, "request_id": request.headers.get("x-request-id", ""),
        }})


def add_to(app: FastAPI) -> None:
    log_as_json()
    app.state.tracing = tracing.new_provider()
    app.middleware("http")(observe)

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

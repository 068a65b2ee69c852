"""The chain through the services of all languages: each asks the next and puts itself before its answer."""

import os
from collections.abc import Mapping

import httpx
from fastapi import APIRouter, HTTPException, Request
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SERVICE = "fastapi-service"

# The sidecars make the spans and write them into these headers. Only the app knows which call belongs to which request,
# so a call that is made for a request carries them.
PASSED_ON = (
    "traceparent", "tracestate", "x-request-id", "b3",
    "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
)

router = APIRouter()


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    passed = {name: headers[name] for name in PASSED_ON if name in headers}
    # The app's own span, where it has one, is the parent of the call's.
    TraceContextTextMapPropagator().inject(passed)
    return passed


def trace_of(headers: Mapping[str, str]) -> tuple[str, str]:
    """The trace and span in W3C's header or in B3's; empty without one."""
    parts = headers.get("traceparent", "").split("-")
    if len(parts) == 4:
        return parts[1], parts[2]
    return headers.get("x-b3-traceid", ""), headers.get("x-b3-spanid", "")


@router.get("/api/v1/chain")
async def chain(request: Request):
    trace_id, _ = trace_of(request.headers)
    links = [{"service": SERVICE, "language": "Python", "work": "a prediction", "trace_id": trace_id}]
    next_url = os.getenv("NEXT_URL")
    if next_url:
        try:
            async with httpx.AsyncClient(timeout=12) as client:
                response = await client.get(f"{next_url}/api/v1/chain", headers=trace_headers(request.headers))
        except httpx.HTTPError as error:
            raise HTTPException(status_code=502, detail=f"{SERVICE} calls {next_url}: {error!r}") from error
        if response.status_code != 200:
            raise HTTPException(status_code=502, detail=f"{SERVICE} calls {next_url}: {response.status_code} {response.text}")
        links += response.json()["chain"]
    return {"chain": links}

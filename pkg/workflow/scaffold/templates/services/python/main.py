"""service-name answers at /service-name, and asks another service for each request where it is told of one."""

import os

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request

import observe

SERVICE = "service-name"

app = FastAPI(title=SERVICE)
observe.add_to(app, SERVICE)


@app.get("/health")
async def health():
    return {"status": "healthy"}


@app.get("/ready")
async def ready():
    return {"status": "ready"}


@app.get("/service-name")
async def answer(request: Request):
    body = {"service": SERVICE, "message": os.getenv("MESSAGE", "hello")}
    next_url = os.getenv("NEXT_URL")
    if next_url:
        body["next"] = await ask(next_url, request)
    return body


async def ask(url: str, request: Request):
    """Asks the next service on behalf of a request."""
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            response = await client.get(url, headers=observe.trace_headers(request.headers))
            response.raise_for_status()
            return response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise HTTPException(status_code=502, detail=f"{SERVICE} asks {url}: {error!r}") from error


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="0.0.0.0",
        port=int(os.getenv("PORT", "8080")),
        # The sidecar keeps idle connections to the app for an hour. A request that is sent into a connection which the
        # app closes is lost; here the sidecar closes first.
        timeout_keep_alive=3900,
        # SIGTERM: what has begun is finished.
        timeout_graceful_shutdown=20,
        log_config=None,
        access_log=False,
    )

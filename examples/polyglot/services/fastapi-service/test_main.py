"""python -m unittest"""

import asyncio
import io
import json
import logging
import os
import threading
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import observe
import tracing
from chain import PASSED_ON, trace_of
from main import app

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def call(method: str, path: str, **options) -> httpx.Response:
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.request(method, path, **options)
    return asyncio.run(one())


class Next(BaseHTTPRequestHandler):
    """The next service of the chain."""
    status = 200
    seen: dict[str, str] = {}

    def do_GET(self):
        Next.seen = {name.lower(): value for name, value in self.headers.items()}
        body = json.dumps({"chain": [{"service": "next"}]}).encode()
        self.send_response(Next.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Guide(unittest.TestCase):
    def test_probes(self):
        self.assertEqual(call("GET", "/health").json(), {"status": "healthy"})
        self.assertEqual(call("GET", "/ready").json(), {"status": "ready"})

    def test_predict(self):
        answer = call("POST", "/api/v1/predict", json={"data": [1, 2, 3]})
        self.assertEqual((answer.status_code, answer.json()), (200, {"prediction": 2.0, "confidence": 0.95}))
        self.assertEqual(call("POST", "/api/v1/predict", json={"data": []}).status_code, 422)


class Chain(unittest.TestCase):
    def setUp(self):
        self.next = ThreadingHTTPServer(("127.0.0.1", 0), Next)
        threading.Thread(target=self.next.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.next.server_port}"
        os.environ["NEXT_URL"] = os.environ["GO_SERVICE_URL"] = url
        Next.status = 200

    def tearDown(self):
        self.next.shutdown()
        self.next.server_close()
        del os.environ["NEXT_URL"], os.environ["GO_SERVICE_URL"]

    def test_passes_the_trace_on(self):
        sent = {name: f"of-{name}" for name in PASSED_ON} | {"traceparent": TRACEPARENT, "cookie": "a=secret"}
        for path in ("/api/v1/chain", "/api/v1/call-go"):
            Next.seen = {}
            self.assertEqual(call("GET", path, headers=sent).status_code, 200)
            for name in PASSED_ON:
                self.assertEqual(Next.seen.get(name), sent[name], f"{path} {name}")
            self.assertNotIn("cookie", Next.seen)

    def test_span(self):
        """The app's span stands between the one that the sidecar sent and the one of the call."""
        spans, before = InMemorySpanExporter(), app.state.tracing
        app.state.tracing = tracing.new_sdk()
        app.state.tracing.add_span_processor(SimpleSpanProcessor(spans))
        self.addCleanup(setattr, app.state, "tracing", before)
        call("GET", "/api/v1/chain", headers={"traceparent": TRACEPARENT})
        [span] = spans.get_finished_spans()
        self.assertEqual((span.name, f"{span.parent.span_id:016x}"), ("GET /api/v1/chain", "00f067aa0ba902b7"))
        self.assertEqual(Next.seen["traceparent"], f"00-4bf92f3577b34da6a3ce929d0e0e4736-{span.context.span_id:016x}-01")
        spans.clear()
        for headers in ({}, {"traceparent": TRACEPARENT[:-1] + "0"}):
            call("GET", "/api/v1/chain", headers=headers)
            self.assertEqual(spans.get_finished_spans(), ())

    def test_adds_itself(self):
        links = call("GET", "/api/v1/chain", headers={"traceparent": TRACEPARENT}).json()["chain"]
        self.assertEqual([link["service"] for link in links], ["fastapi-service", "next"])
        self.assertEqual(links[0]["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736")

    def test_broken(self):
        Next.status = 503
        answer = call("GET", "/api/v1/chain")
        self.assertEqual(answer.status_code, 502)
        self.assertIn("503", answer.json()["detail"])

    def test_end(self):
        del os.environ["NEXT_URL"]
        self.assertEqual(len(call("GET", "/api/v1/chain").json()["chain"]), 1)
        os.environ["NEXT_URL"] = ""


class Observe(unittest.TestCase):
    def test_trace_of(self):
        self.assertEqual(trace_of({"traceparent": TRACEPARENT}), ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"))
        self.assertEqual(trace_of({"x-b3-traceid": "a", "x-b3-spanid": "b"}), ("a", "b"))
        self.assertEqual(trace_of({"traceparent": "nonsense"}), ("", ""))

    def test_log_and_metrics(self):
        written = io.StringIO()
        handler = logging.StreamHandler(written)
        handler.setFormatter(observe.JSONFormatter())
        observe.log.addHandler(handler)
        try:
            call("POST", "/api/v1/predict", json={"data": []}, headers={"traceparent": TRACEPARENT})
            call("GET", "/nowhere")
            call("GET", "/health")
        finally:
            observe.log.removeHandler(handler)
        lines = [json.loads(line) for line in written.getvalue().splitlines()]
        self.assertEqual([(line["path"], line["status"], line["trace_id"]) for line in lines],
                         [("/api/v1/predict", 422, "4bf92f3577b34da6a3ce929d0e0e4736"), ("", 404, "")])
        self.assertEqual({line["service"] for line in lines}, {"fastapi-service"})
        text = call("GET", "/metrics").text
        self.assertIn('http_requests_total{method="POST",path="/api/v1/predict",status="422"}', text)
        self.assertIn('http_request_duration_seconds_count{method="POST",path="/api/v1/predict"}', text)
        self.assertNotIn("/health", text)


if __name__ == "__main__":
    unittest.main()

"""python -m unittest"""

import asyncio
import io
import json
import logging
import os
import threading
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import httpx

import observe
from main import SERVICE, app

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def get(path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.get(path, headers=headers)
    return asyncio.run(one())


class Next(BaseHTTPRequestHandler):
    """The service that is asked."""
    status = 200
    seen: dict[str, str] = {}

    def do_GET(self):
        Next.seen = {name.lower(): value for name, value in self.headers.items()}
        body = b'{"service": "next"}'
        self.send_response(Next.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Answers(unittest.TestCase):
    def test_probes(self):
        self.assertEqual(get("/health").json(), {"status": "healthy"})
        self.assertEqual(get("/ready").json(), {"status": "ready"})
        self.assertEqual(get("/nowhere").status_code, 404)

    def test_answer(self):
        with mock.patch.dict(os.environ, MESSAGE="good day"):
            answer = get("/service-name")
        self.assertEqual((answer.status_code, answer.json()), (200, {"service": SERVICE, "message": "good day"}))


class AsksTheNext(unittest.TestCase):
    def setUp(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Next)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.enterContext(mock.patch.dict(os.environ, NEXT_URL=f"http://127.0.0.1:{server.server_port}"))

    def test_passes_the_trace_on(self):
        Next.status = 200
        sent = {name: f"of-{name}" for name in observe.PASSED_ON} | {"cookie": "a=secret"}
        self.assertEqual(get("/service-name", sent).json()["next"], {"service": "next"})
        for name in observe.PASSED_ON:
            self.assertEqual(Next.seen.get(name), sent[name], name)
        self.assertNotIn("cookie", Next.seen)

    def test_broken(self):
        Next.status = 503
        answer = get("/service-name")
        self.assertEqual(answer.status_code, 502)
        self.assertIn("503", answer.json()["detail"])


class Observed(unittest.TestCase):
    def test_trace_of(self):
        self.assertEqual(observe.trace_of({"traceparent": TRACEPARENT}), ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"))
        self.assertEqual(observe.trace_of({"x-b3-traceid": "a", "x-b3-spanid": "b"}), ("a", "b"))
        self.assertEqual(observe.trace_of({"traceparent": "nonsense"}), ("", ""))

    def test_log_and_metrics(self):
        written = io.StringIO()
        handler = logging.StreamHandler(written)
        handler.setFormatter(observe.JSONFormatter(SERVICE))
        observe.log.addHandler(handler)
        self.addCleanup(observe.log.removeHandler, handler)
        for path in ("/service-name", "/nowhere", "/health"):
            get(path, {"traceparent": TRACEPARENT})
        lines = [json.loads(line) for line in written.getvalue().splitlines()]
        self.assertEqual([(line["service"], line["path"], line["status"], line["trace_id"]) for line in lines],
                         [(SERVICE, path, status, "4bf92f3577b34da6a3ce929d0e0e4736") for path, status in (("/service-name", 200), ("", 404))])
        text = get("/metrics").text
        self.assertIn('http_requests_total{method="GET",path="/service-name",status="200"}', text)
        self.assertIn('http_request_duration_seconds_count{method="GET",path="/service-name"}', text)
        self.assertNotIn("/health", text)


if __name__ == "__main__":
    unittest.main()

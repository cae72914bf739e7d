"""Traces reach a collector, with a span for a request and one for its ask, and no sequence in them."""

from __future__ import annotations

import gzip
import http.server
import threading

import httpx
import pytest
from serving_helpers import CANARY, SEQS


@pytest.fixture
def collector():
    """An OTLP collector on loopback: the bodies that were sent to it."""
    pytest.importorskip("opentelemetry.instrumentation.fastapi", reason="the extra [traces] is not installed")
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_of_request_and_ask(live, collector, monkeypatch):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, bodies = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "here")
    with live(traces=True) as service, httpx.Client(base_url=service.url) as http:
        body = {"sequences": [CANARY, *SEQS], "heads": ["fold"]}
        assert http.post("/v1/predict", json=body).status_code == 200
        assert http.get(f"/v1/models/{CANARY}?q={CANARY}").status_code == 404
        assert http.post("/v1/embed", json={"sequences": [CANARY + "1"]}).status_code == 422
    spans, services = {}, set()
    for sent in bodies:
        for resource in ExportTraceServiceRequest.FromString(sent).resource_spans:
            services |= {
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                spans |= {span.name: span for span in scope.spans}
    assert services == {"here"}
    request, ask = spans["POST /v1/predict"], spans["engine predict"]
    assert ask.parent_span_id == request.span_id and ask.trace_id == request.trace_id
    told = {a.key: a.value for a in ask.attributes}
    assert told["bioseq.model"].string_value == "tiny@1"
    assert told["bioseq.items"].int_value == len(SEQS) + 1 and told["bioseq.engine_s"].double_value > 0
    assert not any(CANARY.encode() in sent for sent in bodies)


def test_nothing_is_sent_unless_asked(live, collector, monkeypatch):
    url, bodies = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with live() as service:
        assert httpx.post(f"{service.url}/v1/embed", json={"sequences": SEQS}).status_code == 200
    assert bodies == []

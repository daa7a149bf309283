"""Spans of requests, as OpenTelemetry's SDK gets them."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from server.kit import ScriptedBackend, running
from server.test_operations import ask

from pace.errors import ConfigError
from pace.server.app import make_app
from pace.server.service import Service
from pace.server.tracing import Tracer
from pace.server.wire import Accepted, Delta, Done, Event, Failed, Job

pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")


def two_tokens(job: Job) -> list[list[Event]]:
    end = Delta(job.id, 0, "answer", [2], finish_reason="stop")
    return [[Delta(job.id, 0, "secret", [1])], [end, Done(job.id, 3, 0, 2, queue_s=0.25)]]


def spans_of(script: Any, *requests: tuple[str, str, dict[str, Any]]) -> list[Any]:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = Tracer("m", SimpleSpanProcessor(exporter))
    ask(make_app(Service(ScriptedBackend(script), ["m"], tracer=tracer)), *requests)
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_has_the_model_the_tokens_and_the_times_of_its_request_and_no_text(stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "secret"}], "stream": stream}
    headers = {"x-request-id": "r1", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    (span,) = spans_of(two_tokens, ("POST", "/v1/chat/completions", {"json": body, "headers": headers}))
    seen = dict(span.attributes)
    first, whole = seen.pop("gen_ai.latency.time_to_first_token"), seen.pop("gen_ai.latency.e2e")
    assert 0 < first <= whole
    assert seen == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.id": "r1",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.latency.time_in_queue": 0.25,
    }
    assert span.name == "POST /v1/chat/completions" and span.kind.name == "SERVER"
    assert span.context.trace_id == int("ab" * 16, 16) and span.parent.span_id == int("cd" * 8, 16)
    assert span.end_time - span.start_time == pytest.approx(whole * 1e9, abs=1e3)
    assert span.resource.attributes["service.name"] == "pace" and span.status.is_unset


def test_refused_and_failed_requests_have_spans_and_scrapes_have_none() -> None:
    def fail(job: Job) -> list[list[Event]]:
        return [[Accepted(job.id, 3)], [Failed(job.id, "the engine died")]]

    spans = spans_of(
        fail,
        ("GET", "/metrics", {}),
        ("GET", "/health", {}),
        ("POST", "/v1/completions", {"json": {"temperature": "hot", "prompt": "x"}}),
        ("POST", "/v1/completions", {"json": {"prompt": "x"}, "headers": {"traceparent": "nonsense"}}),
        ("POST", "/nothing" + "x" * 500, {"json": {}}),
    )
    assert [span.attributes["http.response.status_code"] for span in spans] == [400, 503, 404]
    assert [span.status.is_unset for span in spans] == [True, False, True]
    assert spans[2].name == "POST other"  # whoever invents paths fills no index


def test_no_other_provider_is_touched() -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    spans_of(two_tokens, ("POST", "/v1/completions", {"json": {"prompt": "x"}}))
    assert trace.get_tracer_provider() is before


def test_without_the_packages_the_option_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pace\[otel\]"):
        Tracer.to("http://127.0.0.1:1/v1/traces", "m")


def test_spans_reach_a_collector_before_the_server_ends() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the OTLP exporter")
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    try:
        with running("--otlp-traces-endpoint", endpoint) as server:
            body = {"prompt": "x", "max_tokens": 2}
            headers = {"x-request-id": "the-request"}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
            assert server.stop() == 0
        assert any(b"the-request" in body for body in bodies)
    finally:
        collector.shutdown()
        collector.server_close()

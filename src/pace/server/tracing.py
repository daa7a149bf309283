"""OpenTelemetry (extra `pace[otel]`): a span for each request, with the model, its tokens and its times; never its text."""

from __future__ import annotations

import threading
import time
from typing import Any

from starlette.types import Scope

import pace
from pace.errors import ConfigError, show
from pace.server.metrics import Meter

__all__ = ["Tracer"]

CLOSE_S = 2.0
_CARRIERS = (b"traceparent", b"tracestate")


class Tracer:
    """Makes spans, beneath the caller's where its request names one; the program's global provider stays as it is.

    Args:
        model: the name that the server answers with.
        processor: takes finished spans; as opentelemetry-sdk has them.
    """

    def __init__(self, model: str, processor: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "pace", "service.version": pace.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("pace.server", pace.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._error = StatusCode.ERROR
        self._model = model

    @classmethod
    def to(cls, endpoint: str, model: str) -> Tracer:
        """Sends spans to a collector, from a thread of its own; those that it does not take are lost.

        Args:
            endpoint: OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces.

        Raises:
            ConfigError: it is no address, or the packages are not installed.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"{show(endpoint)} is no address for traces, such as http://127.0.0.1:4318/v1/traces"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'traces need {error.name}; install it with: pip install "pace[otel]"'
            ) from None
        return cls(model, BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=5)))

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        """A request has ended.

        Args:
            scope: its own; `pace.meter` has measured it where an engine had it.
            status: of its answer.
            seconds: since it began.
        """
        end_ns = time.time_ns()
        begin_ns = end_ns - int(seconds * 1e9)
        route = scope.get("pace.route", "other")
        carrier = {
            name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIERS
        }
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            context=self._propagator.extract(carrier),
            kind=self._kind,
            start_time=begin_ns,
            attributes={
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                "gen_ai.request.id": scope["pace.id"],
            },
        )
        meter: Meter | None = scope.get("pace.meter")
        if meter is not None:
            span.set_attributes(self._measured(meter, seconds))
        if status >= 500:
            span.set_status(self._error)
        span.end(end_ns)

    def _measured(self, meter: Meter, seconds: float) -> dict[str, Any]:
        """What is known of the tokens, under the names of OpenTelemetry's conventions and, for times, vLLM's."""
        measured: dict[str, Any] = {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": meter.n_prompt,
            "gen_ai.usage.output_tokens": meter.n_output,
            "gen_ai.latency.e2e": seconds,
        }
        if meter.finish_reasons:
            measured["gen_ai.response.finish_reasons"] = tuple(meter.finish_reasons)
        if meter.first_token_s is not None:
            measured["gen_ai.latency.time_to_first_token"] = meter.first_token_s
        if meter.queue_s is not None:
            measured["gen_ai.latency.time_in_queue"] = meter.queue_s
        return measured

    def close(self) -> None:
        """Send what is left, for two seconds at most: a collector that does not answer holds up no end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)

"""Prometheus metrics, under pace's names and under vLLM's, which dashboards and gateways know."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pace.server.wire import Accepted, Delta, Done, Event

if TYPE_CHECKING:
    from pace.server.service import Service

__all__ = ["CONTENT_TYPE", "Histogram", "Meter", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds from a request to its first token.", _SECONDS),
    "inter_token_latency_seconds": ("Seconds between the tokens of a stream.", _SECONDS),
    "e2e_request_latency_seconds": ("Seconds from a request to its end.", _SECONDS),
    "request_queue_time_seconds": ("Seconds that a request waited for an engine to begin with it.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens that a request drew.", _TOKENS),
}

_GAUGES: Mapping[str, tuple[str, str]] = {
    "num_requests_running": ("n_running", "Sequences that run."),
    "num_requests_waiting": ("n_waiting", "Sequences that wait."),
    "kv_cache_usage_perc": ("kv_usage", "Share of the KV cache that is held, 0 to 1."),
}

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "num_preemptions": ("n_preemptions", "Sequences that gave way to others."),
    "prefix_cache_queries": ("kv_cache.query_tokens", "Tokens that were looked for in the prefix cache."),
    "prefix_cache_hits": ("kv_cache.hit_tokens", "Of these, found."),
    "spec_decode_num_drafts": ("speculative.n_rounds", "Steps that verified drafted tokens."),
    "spec_decode_num_draft_tokens": ("speculative.n_draft_tokens", "Drafted tokens that were verified."),
    "spec_decode_num_accepted_tokens": (
        "speculative.n_accepted_tokens",
        "Of these, those that became output.",
    ),
}

_OWN_COUNTERS: Mapping[str, tuple[str, str]] = {
    "engine_steps": ("n_steps", "Steps of the engine."),
    "engine_step_rows": ("n_tokens", "Rows that they ran; by steps: the mean batch."),
    "engine_step_seconds": ("step_s", "Seconds in steps."),
    "engine_model_seconds": ("run_s", "Of these, in the model."),
    "engine_repeated_steps": (
        "n_repeated_steps",
        "Steps that failed and were repeated one sequence at a time.",
    ),
}


class Histogram:
    """Counts values by size; 0.3 us for one, a tenth of prometheus_client's."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        result, n = [], 0
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            n += count
            result.append((bound, float(n)))
        return result


class Meter:
    """Measures one request; hears every event of its jobs.

    Attributes:
        n_prompt, n_output: its tokens so far.
        first_token_s: seconds until the first one; None: there was none yet.
        queue_s: seconds that its last prompt waited; None while unknown.
        finish_reasons: why its completions ended.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start_s = time.monotonic()
        self._last_s: dict[int, float] = {}  # by job
        self.n_prompt = 0
        self.n_output = 0
        self.first_token_s: float | None = None
        self.queue_s: float | None = None
        self.finish_reasons: list[str] = []
        self._between = metrics.histograms["inter_token_latency_seconds"]

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        metrics = self._metrics
        if isinstance(event, Delta):
            now_s = time.monotonic()
            n = len(event.token_ids)
            if n:
                last_s = self._last_s.get(event.id)
                if last_s is None:
                    seconds = now_s - self._start_s
                    metrics.histograms["time_to_first_token_seconds"].observe(seconds)
                    if self.first_token_s is None:
                        self.first_token_s = seconds
                else:
                    self._between.observe((now_s - last_s) / n)
                self._last_s[event.id] = now_s
                metrics.n_output += n
                self.n_output += n
            if event.finish_reason is not None:
                metrics.finished[event.finish_reason] += 1
                self.finish_reasons.append(event.finish_reason)
        elif isinstance(event, Accepted):
            self.n_prompt += event.n_prompt
        elif isinstance(event, Done):
            metrics.n_prompt += event.n_prompt
            metrics.histograms["e2e_request_latency_seconds"].observe(time.monotonic() - self._start_s)
            metrics.histograms["request_prompt_tokens"].observe(event.n_prompt)
            metrics.histograms["request_generation_tokens"].observe(event.n_output)
            if event.queue_s is not None:
                self.queue_s = event.queue_s
                metrics.histograms["request_queue_time_seconds"].observe(event.queue_s)


class Metrics(Collector):
    """What the front-end has counted, and what the engines say of themselves.

    Args:
        service: whose.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.finished: Counter[str] = Counter()  # completions, by why they ended
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.n_prompt = 0
        self.n_output = 0

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The registry asks for this."""
        for prefix in ("pace:", "vllm:"):
            yield from self._shared(prefix)
        yield from self._own()

    def _shared(self, prefix: str) -> Iterator[Metric]:
        """What both namespaces have."""
        model = self._service.names[0]
        engines = list(enumerate(self._service.backend.stats()))
        for name, (key, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name", "engine"])
            for i, stats in engines:
                gauge.add_metric([model, str(i)], _at(stats, key))
            yield gauge
        for name, (key, text) in _COUNTERS.items():
            counter = CounterMetricFamily(prefix + name, text, labels=["model_name", "engine"])
            for i, stats in engines:
                counter.add_metric([model, str(i)], _at(stats, key))
            yield counter
        yield _counter(
            prefix + "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that became output, by their position in a draft.",
            {
                (model, str(i), str(at)): n
                for i, stats in engines
                for at, n in enumerate(stats.get("speculative", {}).get("accepted_at", ()))
            },
            ["model_name", "engine", "position"],
        )
        for name, value, text in (
            ("prompt_tokens", self.n_prompt, "Tokens of prompts."),
            ("generation_tokens", self.n_output, "Tokens that were drawn."),
        ):
            yield _counter(prefix + name, text, {(model,): value}, ["model_name"])
        reasons: dict[tuple[str, ...], float] = {(model, reason): n for reason, n in self.finished.items()}
        text = "Completions, by why they ended."
        yield _counter(prefix + "request_success", text, reasons, ["model_name", "finished_reason"])
        for name, (text, _) in _HISTOGRAMS.items():
            histogram = self.histograms[name]
            family = HistogramMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric([model], buckets=histogram.buckets(), sum_value=histogram.total)
            yield family
        info = GaugeMetricFamily(
            prefix + "cache_config_info", "The KV cache.", labels=["block_size", "num_gpu_blocks", "engine"]
        )
        for i, stats in engines:
            info.add_metric([str(stats.get("block_size", 0)), str(stats.get("n_blocks", 0)), str(i)], 1.0)
        yield info

    def _own(self) -> Iterator[Metric]:
        """What vLLM has no name for."""
        backend = self._service.backend
        for name, (key, text) in _OWN_COUNTERS.items():
            counter = CounterMetricFamily("pace:" + name, text, labels=["engine"])
            for i, stats in enumerate(backend.stats()):
                counter.add_metric([str(i)], _at(stats, key))
            yield counter
        responses: dict[tuple[str, ...], float] = {
            (route, str(status)): n for (route, status), n in self.responses.items()
        }
        yield _counter("pace:http_responses", "Answers, by route and status.", responses, ["route", "status"])
        yield GaugeMetricFamily(
            "pace:jobs_open", "Prompts whose completions have not ended.", backend.n_calls
        )
        yield GaugeMetricFamily("pace:healthy", "Whether every engine runs.", float(backend.health().ok))
        yield CounterMetricFamily(
            "pace:engine_restarts", "Engines that died and were started again.", backend.n_restarts
        )


def _counter(name: str, text: str, values: Mapping[tuple[str, ...], float], labels: list[str]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        counter.add_metric(list(key), value)
    return counter


def _at(stats: Mapping[str, Any], path: str) -> float:
    """A number in nested counters; 0 where there is none."""
    value: Any = stats
    for key in path.split("."):
        value = value.get(key, 0) if isinstance(value, Mapping) else 0
    return float(value) if isinstance(value, (int, float)) else 0.0

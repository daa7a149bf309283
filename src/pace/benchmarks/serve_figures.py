"""The figures of a run of `pace bench serve`, under vLLM's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pace.benchmarks.serve import Outcome

__all__ = ["GOODPUT_METRICS", "METRICS", "format_serve", "summary"]

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")

_NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, without the first",
    "itl": "Time between chunks",
    "e2el": "Time to the end",
}


def summary(
    outcomes: Sequence[Outcome],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
    is_detailed: bool = False,
) -> dict[str, Any]:
    """The figures of a run under vLLM's names; times in milliseconds.

    Beside them: failed, and of these rejected (429), with percentiles of how fast those answers came; errors by their text.

    Args:
        goodput: milliseconds that requests must keep to count in request_goodput, by name of `GOODPUT_METRICS`.
        is_detailed: with the values of every request.
    """
    done = [outcome for outcome in outcomes if outcome.ok]
    rejected = [outcome for outcome in outcomes if outcome.status == 429]
    n_input, n_output = sum(one.n_input for one in done), sum(one.n_output for one in done)
    seconds: dict[str, list[float]] = {
        "ttft": [one.ttft_s for one in done],
        "tpot": [tpot for one in done if (tpot := one.tpot_s) is not None],
        "itl": [itl for one in done for itl in one.itls_s],
        "e2el": [one.end_s for one in done],
    }
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "rejected": len(rejected),
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": None if not goodput else sum(_keeps(one, goodput) for one in done) / duration_s,
        "output_throughput": n_output / duration_s,
        "total_token_throughput": (n_input + n_output) / duration_s,
        "max_concurrent_requests": _most_open(outcomes),
    }
    for name in METRICS:
        result |= _statistics(name, seconds[name], percentiles)
    if rejected:
        result |= _statistics("rejection", [one.end_s for one in rejected], percentiles)
    result["errors"] = dict(Counter(one.error for one in outcomes if not one.ok).most_common(20))
    if is_detailed:
        result |= {
            "input_lens": [one.n_input for one in outcomes],
            "output_lens": [one.n_output for one in outcomes],
            "start_times": [one.start_s for one in outcomes],
            "ttfts": [one.ttft_s for one in outcomes],
            "itls": [one.itls_s for one in outcomes],
            "generated_texts": [one.text for one in outcomes],
            "errors_of_requests": [one.error for one in outcomes],
        }
    return result


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    ms = np.asarray(seconds or [0.0]) * 1e3
    values = {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
    values |= {f"p{p:g}_{name}_ms": np.percentile(ms, p) for p in percentiles}
    return {key: float(value) for key, value in values.items()}


def _keeps(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    values = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s or 0.0, "e2el": outcome.end_s}
    return all(values[name] * 1e3 <= limit_ms for name, limit_ms in goodput.items())


def _most_open(outcomes: Sequence[Outcome]) -> int:
    changes = [(one.start_s, 1) for one in outcomes] + [(one.start_s + one.end_s, -1) for one in outcomes]
    most = n_open = 0
    for _, change in sorted(changes):
        n_open += change
        most = max(most, n_open)
    return most


def format_serve(result: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """A table for people."""
    done = (
        f"{result['model_id']} at {result['base_url']}: {result['completed']} requests in {result['duration']:.2f} s, "
        f"{result['failed']} failed ({result['rejected']} with 429)"
    )
    rates = (
        f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} output tokens/s, "
        f"{result['total_token_throughput']:.1f} tokens/s; at most {result['max_concurrent_requests']} at a time"
    )
    lines = [done, rates]
    if result["request_goodput"] is not None:
        lines.append(f"{result['request_goodput']:.2f} requests/s within {result['goodput']}")
    columns = "".join(f"{f'p{p:g}':>11}" for p in percentiles)
    lines += ["", f"{'milliseconds':<42}{'mean':>11}{'median':>11}{columns}"]
    for name in METRICS:
        values = [result[f"mean_{name}_ms"], result[f"median_{name}_ms"]]
        values += [result[f"p{p:g}_{name}_ms"] for p in percentiles]
        lines.append(f"{_NAMES[name]:<42}" + "".join(f"{value:11.2f}" for value in values))
    lines += [f"{n} x {text[:150]}" for text, n in result["errors"].items()]
    return "\n".join(lines)

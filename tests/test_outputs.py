"""The shape of outputs, and what is derived from their times."""

from __future__ import annotations

from pace.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def test_shape() -> None:
    completion = CompletionOutput(0, "text", [1, 2], -0.5, [{1: Logprob(-0.5, 1, "t")}], "stop", "x")
    output = RequestOutput("id", "prompt", [0], [completion], True)
    assert output.outputs[0].text == "text" and output.outputs[0].finished()
    assert not CompletionOutput(0, "", []).finished()
    assert output.metrics is not RequestOutput("id", None, [], []).metrics
    assert output.prompt_logprobs is None and output.num_cached_tokens == 0


def test_metrics() -> None:
    metrics = RequestMetrics(arrival_s=1.0)
    assert metrics.time_to_first_token_s is None and metrics.decode_tokens_per_s is None
    metrics.first_token_s, metrics.finished_s, metrics.n_output_tokens = 1.5, 2.5, 11
    assert metrics.time_to_first_token_s == 0.5
    assert metrics.decode_tokens_per_s == 10.0
    metrics.n_output_tokens = 1
    assert metrics.decode_tokens_per_s is None

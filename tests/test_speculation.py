"""Speculation through the front door: the embedded pair, whose text means something, says the same with and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from pace import LLM, SamplingParams
from pace.params import RequestOutputKind
from pace.speculative.controller import Controller

PROMPTS = ["def fibonacci(n):\n", "import os\n\nclass Foo:\n    def", "for i in range(10):\n", "x = [1, 2,"]
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "logprobs": 0},
    {"temperature": 0.9, "seed": 4, "n": 2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 0.0, "stop": ["return", "self."], "include_stop_str_in_output": True},
    {"temperature": 0.0, "stop": ["\n\n"], "min_tokens": 20},
    {"temperature": 0.0, "bad_words": ["self", "return"], "logit_bias": {20: 3.0}},
    {"temperature": 0.7, "seed": 5, "allowed_token_ids": list(range(300)), "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 0.0, "stop_token_ids": [199, 13, 220], "min_tokens": 5},
    {"temperature": 0.0, "ignore_eos": True, "max_tokens": 70},
]


def outputs(llm: LLM) -> list[Any]:
    """All that callers see of outputs, but times and what speculation did."""
    params = [SamplingParams(**{"max_tokens": 30} | asked) for asked in ASKED]
    found = []
    for one in params:
        for output in llm.generate(PROMPTS, one):
            found.append((output.outputs, output.prompt_logprobs))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    found += [(output.outputs, output.prompt_logprobs) for output in llm.generate(prompts, params)]
    return found


@pytest.fixture(scope="module")
def plain() -> Iterator[list[Any]]:
    with LLM("demo", max_num_seqs=4, max_model_len=256) as llm:
        yield outputs(llm)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "demo-draft", "num_speculative_tokens": 3},
        {"method": "pard", "model": "demo-draft", "num_speculative_tokens": 8},
        pytest.param({"model": "demo", "num_speculative_tokens": 3}, marks=pytest.mark.slow),
        pytest.param(
            {"model": "demo-draft", "num_speculative_tokens": 16, "draft_window": 32}, marks=pytest.mark.slow
        ),
        {"method": "suffix", "num_speculative_tokens": 12, "past_output_tokens": 10_000},
        {
            "method": "hybrid",
            "model": "demo-draft",
            "num_speculative_tokens": 8,
            "past_output_tokens": 10_000,
        },
        pytest.param(
            {"model": "demo-draft", "num_speculative_tokens": 8, "adaptive": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_outputs_are_the_same(plain: list[Any], options: dict[str, Any]) -> None:
    given = {"method": "draft_model", "adaptive": False} | options
    with LLM("demo", max_num_seqs=4, max_model_len=256, speculative=given) as llm:
        assert outputs(llm) == plain
        stats = llm.stats()["speculative"]
        assert stats["active"]
        if not given["adaptive"]:  # else wall time decides
            assert stats["n_accepted_tokens"] > 70 and stats["mean_acceptance_length"] > 1.2


@pytest.mark.parametrize("method", ["pard", "draft_model", "hybrid"])
def test_outputs_are_the_same_however_many_guesses_a_round_makes(
    plain: list[Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller's choice in all directions, as wall time might make it."""
    rng = np.random.default_rng(5)

    def wanted(self: Controller, seqs: Sequence[Any], n_rows: int) -> dict[Any, int]:
        chosen = [seq for seq in seqs if rng.random() < 0.9]
        return dict.fromkeys(chosen, int(rng.integers(1, self.max_tokens + 1)))

    monkeypatch.setattr(Controller, "wanted", wanted)
    monkeypatch.setattr(
        Controller,
        "cut",
        lambda self, proposals, n_rows: {seq: len(p.token_ids) for seq, p in proposals.items()},
    )
    given = {"method": method, "model": "demo-draft", "num_speculative_tokens": 8}
    with LLM("demo", max_num_seqs=4, max_model_len=256, speculative=given) as llm:
        assert outputs(llm) == plain
        assert len(llm.stats()["speculative"]["by_length"]) > 8
        assert llm.stats()["speculative"]["n_accepted_tokens"] > 70


def test_a_stream_tells_of_several_tokens_at_once() -> None:
    given = {"method": "draft_model", "model": "demo", "num_speculative_tokens": 4, "adaptive": False}
    params = SamplingParams(
        max_tokens=21, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    with LLM("demo", max_model_len=128, speculative=given) as llm:
        parts = [output.outputs[0] for output in llm.stream(PROMPTS[0], params)]
        whole = llm.generate(PROMPTS[0], params)[0].outputs[0]
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == list(whole.token_ids)
    assert max(len(part.token_ids) for part in parts) > 1

"""Law 1 and the options through the whole engine, with matrices of a few bits: outputs and log probabilities of a request
are the same numbers whatever the batch, the chunks, the KV cache, the threads and the drafts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pace import LLM, SamplingParams
from pace.engine import guard
from pace.errors import ConfigError
from pace.export import quantize_checkpoint

PROMPTS = (
    "def area(radius):\n",
    "import os\nimport sys\n\n\nclass Reader:\n",
    "# ",
    "for i in range(10):\n    ",
)
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3)
OTHERS: tuple[dict[str, Any], ...] = (
    {"max_num_batched_tokens": 5, "max_num_seqs": 3, "threads": 2},
    {"kv_cache_type": "paged", "threads": 2},
    {"kv_cache_type": "contiguous", "enable_prefix_caching": False, "threads": 1},
    {
        "speculative": {"method": "pard", "model": "demo-draft", "num_speculative_tokens": 4},
        "threads": 2,
    },
)


def answers(llm: LLM, prompts: Any = PROMPTS) -> list[Any]:
    """Tokens of each, with their log probabilities as they are."""
    out = []
    for one in llm.generate(list(prompts), PARAMS):
        (c,) = one.outputs
        out.append((tuple(c.token_ids), [{i: x.logprob for i, x in at.items()} for at in c.logprobs or ()]))
    return out


@pytest.mark.parametrize(
    ("quantization", "activation_dtype"),
    [
        ("int8", "int8"),
        ("int8", "bf16"),
        ("int4", "auto"),
        ("int4", "bf16"),
        ("fp8", "auto"),
        ("w8", "int8"),
        ("w4g128", "int8"),
        ("int8-head", "auto"),
    ],
)
def test_law_1(quantization: str, activation_dtype: str) -> None:
    options: dict[str, Any] = {"quantization": quantization, "activation_dtype": activation_dtype}
    with LLM("demo", threads=1, **options) as llm:
        alone = [answers(llm, [prompt])[0] for prompt in PROMPTS]
        assert answers(llm) == alone
    for other in OTHERS:
        with LLM("demo", **options, **other) as llm:
            assert answers(llm) == alone, other


def test_fewer_bytes_and_nearly_the_same_numbers() -> None:
    text = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def scored(**options: Any) -> tuple[int, float]:
        with LLM("demo", threads=2, **options) as llm:
            ids = llm.get_tokenizer().encode(text)
            (out,) = llm.generate([text], params)
            at = zip(ids[1:], (out.prompt_logprobs or ())[1:], strict=True)
            return llm.loaded.weights_bytes, float(np.mean([row[i].logprob for i, row in at if row]))

    plain, whole = scored()
    for quantization, most, off in (("int8", 0.6, 0.02), ("int4", 0.4, 0.15), ("fp8", 0.6, 0.08)):
        n_bytes, mean = scored(quantization=quantization)
        assert n_bytes < most * plain
        assert abs(mean - whole) < off, quantization


def test_the_guard_leaves_bf16_rows_where_outputs_would_change(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line; with a limit that nothing meets the answers are those of bf16 rows."""
    monkeypatch.setattr(guard, "MAX_ERROR", 0.0)
    with caplog.at_level(logging.INFO, "pace"), LLM("demo", threads=2, quantization="int8") as llm:
        guarded = answers(llm)
    (line,) = (r.getMessage() for r in caplog.records if "activation_dtype auto" in r.getMessage())
    assert "int8 rows for 0 of" in line and "\n" not in line
    with LLM("demo", threads=2, quantization="int8", activation_dtype="bf16") as llm:
        assert answers(llm) == guarded


@pytest.mark.parametrize("quantization", ["w4g32", "w8"])
def test_the_head_of_a_quantised_checkpoint(quantization: str, tmp_path: Path) -> None:
    """Its layers keep the file's codes, and its head takes half of the bytes."""
    files = tmp_path / "model"
    quantize_checkpoint("demo", files, quantization)
    options: dict[str, Any] = {"activation_dtype": "bf16", "threads": 2}
    with LLM(str(files), **options) as llm:
        plain, n_bytes, spec = answers(llm), llm.loaded.weights_bytes, llm.loaded.spec
    with LLM(str(files), quantization="int8-head", **options) as llm:
        saved = spec.vocab_size * spec.dim * (16 - 8.5) / 8
        assert n_bytes - llm.loaded.weights_bytes == pytest.approx(saved, rel=0.02)
        for (_, was), (_, rounded) in zip(plain, answers(llm), strict=True):
            both = was[0].keys() & rounded[0].keys()
            assert both and all(abs(was[0][i] - rounded[0][i]) < 0.05 for i in both)
    with pytest.raises(ConfigError, match="quantised already; leave the option out, or take int8-head"):
        LLM(str(files), quantization="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "quantization is 'int3', expected one of int8, int4, fp8"),
        ({"activation_dtype": "fp8"}, "activation_dtype is 'fp8', expected one of auto, bf16, int8"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("demo", **options)

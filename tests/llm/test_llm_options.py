"""How the façade loads: options, files that are missing or say more, memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from llm.kit import GREEDY, answers
from tiny_checkpoint import write_checkpoint

from pace.errors import CapacityError, CheckpointError, ConfigError, RequestError, WeightsError
from pace.llm import LLM
from pace.params import SamplingParams


def test_generation_config_fills_what_the_caller_leaves_open(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.0, "max_new_tokens": 5, "eos_token_id": [3, 4]})
    )
    with LLM(model, threads=1) as llm:
        assert llm.engine.eos_token_ids >= {3, 4}
        (default,) = llm.generate("a")
        (again,) = llm.generate("a", SamplingParams())
        (longer,) = llm.generate("a", SamplingParams(max_tokens=7, ignore_eos=True))
        (sampled,) = llm.generate("a", SamplingParams(temperature=5.0, seed=1, ignore_eos=True))
    assert default.outputs == again.outputs
    assert len(longer.outputs[0].token_ids) == 7
    assert (
        list(longer.outputs[0].token_ids[:5])[: len(default.outputs[0].token_ids)]
        == default.outputs[0].token_ids
    )
    assert sampled.outputs[0].token_ids != longer.outputs[0].token_ids[:5]


def test_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(bare)
    with LLM(bare, skip_tokenizer_init=True, threads=1) as llm:
        (output,) = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)
        assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].text == ""
        with pytest.raises(RequestError, match="without a tokenizer"):
            llm.generate("text")
    with LLM(bare, tokenizer=model, threads=1) as llm:
        assert llm.generate("text", GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 513}, ConfigError, "supports 512"),
        ({"max_model_len": 0}, ConfigError, "max_model_len is 0"),
        ({"threads": 0}, ConfigError, "n_threads is 0"),
        ({"cpus": "3-1"}, ConfigError, "empty"),
        ({"cpus": []}, ConfigError, "cpus"),
        ({"kernels": {"gemm": "sse2"}}, ConfigError, "sse2"),
        ({"kernels": {"gem": "avx2"}}, ConfigError, "'gem'"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs"),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 3}, ConfigError, "below max_num_seqs"),
        ({"kv_cache_type": "ring"}, ConfigError, "expected one of slab, paged, contiguous"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "kv_cache_dtype"),
        ({"kv_cache_memory": "much"}, ConfigError, "kv_cache_memory"),
        ({"admission": "first"}, ConfigError, "admission"),
        ({"max_num_waiting": 0}, ConfigError, "max_num_waiting"),
        ({"revision": "main"}, CheckpointError, "revision"),
        ({"seed": -1}, ConfigError, "seed"),
    ],
)
def test_bad_options(model: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(model, **options)


@pytest.mark.parametrize(
    ("options", "block_size"),
    [
        ({"kv_cache_type": "paged"}, 16),
        ({"kv_cache_type": "slab", "block_size": 64, "admission": "reserve"}, 64),
        ({"kv_cache_type": "contiguous", "block_size": 32, "kv_cache_memory": "4MiB"}, 32),
        ({"kv_cache_memory": 1 << 22, "block_size": 32, "enable_prefix_caching": False}, 32),
    ],
)
def test_the_kv_cache_is_chosen(llm: LLM, model: Path, options: dict[str, Any], block_size: int) -> None:
    prompts = ["a" * n for n in (1, 90, 33, 90)]
    with LLM(model, threads=1, max_num_seqs=3, **options) as other:
        assert answers(other.generate(prompts, GREEDY)) == answers(llm.generate(prompts, GREEDY))
        assert other.stats()["block_size"] == block_size


def test_an_int8_cache(model: Path) -> None:
    with LLM(model, threads=1, kv_cache_dtype="int8") as llm:
        assert len(llm.generate("a" * 50, GREEDY)[0].outputs[0].token_ids) == 12


def test_kernels_can_be_forced(llm: LLM, model: Path) -> None:
    with LLM(model, threads=1, kernels={"attention": "reference", "gemm": "reference"}) as other:
        assert len(other.generate("a", GREEDY)[0].outputs[0].token_ids) == 12


def test_missing_weights_leave_nothing_behind(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    n_threads = threading.active_count()
    with pytest.raises(WeightsError, match=r"layers\.2"):
        LLM(model)
    assert threading.active_count() == n_threads


def test_capacity_names_the_knob(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.engine.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="max_num_batched_tokens"):
        LLM(model)


def test_the_lengths_that_rope_was_not_chosen_for_are_told_at_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_checkpoint(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    found = []
    for max_model_len, told in ((512, False), (None, True), (600, True)):
        caplog.clear()
        with LLM(model, threads=1, max_model_len=max_model_len) as llm:
            assert ("with max_model_len 512 none does" in caplog.text) is told
            (out,) = llm.generate("the length counts", SamplingParams(max_tokens=1, logprobs=5))
        found.append(out.outputs[0].logprobs)
    assert found[0] != found[1] and found[0] != found[2]

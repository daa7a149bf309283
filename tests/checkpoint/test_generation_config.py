"""Defaults and EOS ids come from every file that states them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pace.checkpoint import load_generation_defaults
from pace.params import SamplingParams


def load(
    folder: Path,
    generation: dict[str, Any] | None,
    config: dict[str, Any] | None = None,
    eos: int | None = None,
) -> Any:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_generation_defaults(folder, config or {}, vocab_size=100, tokenizer_eos_id=eos)


def test_nothing_stated(tmp_path: Path) -> None:
    defaults = load(tmp_path, None)
    assert defaults.sampling == {} and defaults.eos_token_ids == frozenset()
    assert load(tmp_path, {}).sampling == {}


def test_sampling(tmp_path: Path) -> None:
    stated = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
              "max_new_tokens": 64, "do_sample": True, "max_length": 4096, "pad_token_id": 0}  # fmt: skip
    defaults = load(tmp_path, stated)
    merged = SamplingParams(top_k=0).merged_with(defaults.sampling)
    assert (merged.temperature, merged.top_p, merged.min_p, merged.repetition_penalty) == (
        0.6,
        0.95,
        0.05,
        1.1,
    )
    assert merged.max_tokens == 64 and merged.top_k == 0
    with pytest.raises(TypeError):
        defaults.sampling["temperature"] = 1


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    defaults = load(tmp_path, {"do_sample": False, "temperature": 0.7, "top_p": None})
    assert SamplingParams().merged_with(defaults.sampling).greedy
    assert SamplingParams(temperature=0.7).merged_with(defaults.sampling).temperature == 0.7


def test_eos_is_the_union(tmp_path: Path) -> None:
    config = {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}
    assert load(tmp_path, {"eos_token_id": [3, 4]}, config, 5).eos_token_ids == {1, 2, 3, 4, 5}
    assert load(tmp_path, {"eos_token_id": None}, {"eos_token_id": None}).eos_token_ids == frozenset()

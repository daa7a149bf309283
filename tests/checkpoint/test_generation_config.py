"""Defaults and EOS ids come from every file that states them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pace.checkpoint import load_generation_defaults
from pace.checkpoint.generation_config import _SAMPLING_FIELDS
from pace.errors import CheckpointError
from pace.params import SamplingParams, Unset


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


def test_every_default_of_a_checkpoint_can_be_left_unset(tmp_path: Path) -> None:
    """A field that a checkpoint sets and that is no `Unset` by default would look as if the caller had chosen it."""
    stated = dict.fromkeys(_SAMPLING_FIELDS, 1)
    defaults = load(tmp_path, stated).sampling
    assert set(defaults) == set(_SAMPLING_FIELDS.values()) and len(defaults) == 8
    for name, value in defaults.items():
        assert isinstance(getattr(SamplingParams(), name), Unset), name
        assert getattr(SamplingParams().merged_with(defaults), name) == value
        default = getattr(SamplingParams(), name) + 0  # the same number, but given
        assert getattr(SamplingParams(**{name: default}).merged_with(defaults), name) == default


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    defaults = load(tmp_path, {"do_sample": False, "temperature": 0.7, "top_p": None})
    assert SamplingParams().merged_with(defaults.sampling).greedy
    assert SamplingParams(temperature=0.7).merged_with(defaults.sampling).temperature == 0.7


def test_eos_is_the_union(tmp_path: Path) -> None:
    config = {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}
    assert load(tmp_path, {"eos_token_id": [3, 4]}, config, 5).eos_token_ids == {1, 2, 3, 4, 5}
    assert load(tmp_path, {"eos_token_id": [3, 4]}, config, 5).eos_token_id == 5  # the tokenizer's
    assert load(tmp_path, {"eos_token_id": [3, 4]}, config).eos_token_id == 1
    assert load(tmp_path, {"eos_token_id": [3, 4]}).eos_token_id == 3
    assert load(tmp_path, {"eos_token_id": []}).eos_token_id is None
    assert load(tmp_path, {"eos_token_id": None}, {"eos_token_id": None}).eos_token_ids == frozenset()


def test_sampling_defaults_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    (tmp_path / "other" / "generation_config.json").write_text('{"top_k": 5, "eos_token_id": 4}')

    def source(name: str) -> Any:
        return load_generation_defaults(tmp_path, {}, vocab_size=100, source=name)

    assert dict(source("auto").sampling) == {"temperature": 0.6} and source("auto").eos_token_ids == {3}
    assert dict(source("vllm").sampling) == {} and source("vllm").eos_token_ids == {3}
    other = source(str(tmp_path / "other"))
    assert dict(other.sampling) == {"top_k": 5} and other.eos_token_ids == {3, 4} and other.eos_token_id == 3
    for text, message in (
        ('{"top_k": -5}', "other/generation_config.json: top_k is -5"),
        ("", "generation_config.json"),
    ):
        (tmp_path / "other" / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            source(str(tmp_path / "other"))
    with pytest.raises(
        CheckpointError, match=r"generation_config: .* name a folder that has one, auto or vllm"
    ):
        source(str(tmp_path / "nowhere"))

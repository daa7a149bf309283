"""Drafts in few bits: what they take is less, and what the target says is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from speculative.test_pard2 import draft as pard2_draft
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams, ops
from pace.config import EngineConfig
from pace.engine import loader
from pace.errors import ConfigError
from pace.export import quantize_checkpoint
from pace.models.plan import Plan
from pace.speculative import loader as draft_loader
from pace.speculative.loader import DraftMaker
from pace.speculative_config import SpeculativeConfig

PROMPTS = ["def area(radius):\n", "import os\nimport sys\n\n\nclass Reader:\n", "# "]
ASKED = SamplingParams(max_tokens=24, temperature=0.7, seed=5, logprobs=2)


def spoken(llm: LLM, prompts: Any = PROMPTS) -> list[Any]:
    return [output.outputs for output in llm.generate(prompts, ASKED)]


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of the packed matrices of drafts that were loaded."""
    found: set[str] = set()

    def chosen(*given: Any) -> Plan:
        found.update(w.format for w in given[2].weights.values() if isinstance(w, ops.PackedMatrix))
        return loader.with_activations(*given)

    monkeypatch.setattr(draft_loader, "with_activations", chosen)
    return found


def pard(model: str, **options: Any) -> dict[str, Any]:
    return {
        "method": "pard",
        "model": model,
        "num_speculative_tokens": 5,
        "adaptive": False,
        **options,
    }


@pytest.mark.parametrize("activation_dtype", ["auto", "bf16", "int8"])
def test_the_target_says_the_same_and_guesses_stand(activation_dtype: str, formats: set[str]) -> None:
    options: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 128, "threads": 2}
    options["activation_dtype"] = activation_dtype
    with LLM("demo", **options) as llm:
        plain = spoken(llm)
    for quantization, expected in (("int8", {"int8g32"}), ("int4", {"int4g32", "int8g32"})):
        with LLM("demo", speculative=pard("demo-draft", quantization=quantization), **options) as llm:
            assert spoken(llm) == plain
            assert formats == expected
            formats.clear()
            stats = llm.stats()["speculative"]
            assert stats["active"] and stats["n_accepted_tokens"] > 8


def test_a_draft_is_rounded_as_the_target_is_unless_told_otherwise() -> None:
    sizes = []
    for target, draft in ((None, None), ("int8", None), (None, "int8"), ("int4", None), ("int4", "bf16")):
        config = EngineConfig("demo", quantization=target, activation_dtype="bf16")
        maker = DraftMaker(config, SpeculativeConfig(**pard("demo-draft", quantization=draft)))
        sizes.append(maker.n_bytes)
    plain, as_int8, int8, as_int4, told = sizes
    assert told == plain > int8 == as_int8 > as_int4


def test_a_draft_whose_file_is_quantised_is_held_as_it_is(tmp_path: Path, formats: set[str]) -> None:
    plain = write_checkpoint(tmp_path / "plain", pard_token=261)
    quantize_checkpoint(str(plain), tmp_path / "draft", "w4g32")
    target = str(write_checkpoint(tmp_path / "target"))
    options: dict[str, Any] = {"max_model_len": 96, "threads": 1}
    prompts = [[5, 9, 31, 17], [4] * 30]
    with LLM(target, **options) as llm:
        expected = spoken(llm, prompts)
    draft = str(tmp_path / "draft")
    with LLM(target, speculative=pard(draft), **options) as llm:
        assert spoken(llm, prompts) == expected
        assert "int4g32" in formats
    formats.clear()
    with LLM(target, speculative=pard(draft, quantization="int8-head"), **options) as llm:
        assert spoken(llm, prompts) == expected
        assert formats == {"int4g32", "int8g32"}
    with pytest.raises(
        ConfigError, match=r"speculative: quantization is int8, but the draft .* leave the option out"
    ):
        LLM(target, speculative=pard(draft, quantization="int8"), **options)
    with pytest.raises(ConfigError, match="speculative: quantization is 'int3', expected one of int8, int4"):
        LLM(target, speculative=pard(draft, quantization="int3"), **options)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_beside_a_trimmed_vocabulary_and_a_projection_of_states(quantization: str, tmp_path: Path) -> None:
    target = str(write_checkpoint(tmp_path / "target", num_hidden_layers=3))
    vocabulary = tmp_path / "tokens.json"
    vocabulary.write_text(json.dumps({"token_ids": list(range(0, 260, 3))}))
    options: dict[str, Any] = {"max_model_len": 96, "threads": 1}
    prompts = [[5, 9, 31, 17], [4] * 30]
    with LLM(target, **options) as llm:
        expected = spoken(llm, prompts)
    for more in ({}, {"draft_vocab": str(vocabulary)}):
        given = pard(pard2_draft(tmp_path / f"draft{len(more)}"), quantization=quantization, **more)
        with LLM(target, speculative=given, **options) as llm:
            assert spoken(llm, prompts) == expected
            assert llm.stats()["speculative"]["active"]

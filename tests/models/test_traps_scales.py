"""Traps of scales, caps and multipliers (see traps.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import families, tiny
from golden.harness import (
    in_chunks,
    prefill,
    relative_error,
)
from models.traps import (
    TOLERANCE,
    FamilyModel,
    error_of,
    ops_of,
    plan_of,
    prompt,
    spec_of,
    with_ops,
)

from pace import LLM, SamplingParams
from pace.models.plan import Attention, Embed, Gemm


@pytest.mark.parametrize(("name", "scalar"), [("gemma2-caps", 20), ("gemma3_text-cap27b", 168)])
def test_11_12_scale_comes_from_the_config_not_from_a_width(name: str, scalar: float) -> None:
    assert {op.scale for op in ops_of(plan_of(name), Attention)} == {scalar**-0.5}


def test_13_soft_cap_of_scores_is_forgotten(model_of: FamilyModel, golden: dict[str, np.ndarray]) -> None:
    name = "gemma2-caps"
    model = model_of(name, gain=2.0)
    assert error_of(model, name, golden) < TOLERANCE
    uncapped = with_ops(model.plan, Attention, lambda op: {"softcap": None})
    assert error_of(model, name, golden, ops=uncapped) > 100 * TOLERANCE
    assert np.isfinite(prefill(model_of(name, gain=40.0).reference(), prompt(name))).all()


def test_14_final_cap_saturates_at_the_cap(model_of: FamilyModel) -> None:
    model = model_of("gemma2-odd")
    loud = with_ops(model.plan, Gemm, lambda op: {"scale": 1000.0} if op.name == "lm_head" else {})
    logits = prefill(model.reference(ops=loud), prompt("gemma2-odd"))
    assert np.abs(logits).max() <= 5.0
    assert np.median(np.abs(logits)) > 4.99


def test_15_scoring_skips_the_final_cap(tmp_path: Path, model_of: FamilyModel) -> None:
    name = "gemma2-odd"
    tiny.write(name, tmp_path, families.CASES[name])
    tokens = prompt(name)[:20]
    llm = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64, threads=1)
    try:
        score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scored = llm.generate([tokens], score)[0].prompt_logprobs
    finally:
        llm.close()
    assert scored is not None
    logits = prefill(model_of(name).reference(), tokens)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for i in range(1, 20):
        entries = scored[i]
        assert entries is not None and entries[tokens[i]].logprob == pytest.approx(
            expected[i - 1, tokens[i]], abs=0.2
        )


def test_16_granite_scales_scores_twice_or_forgets_the_residual_in_decode(model_of: FamilyModel) -> None:
    plan = plan_of("granite-g3")
    assert {op.scale for op in ops_of(plan, Attention)} == {0.015625}
    added = [op.scale for op in ops_of(plan, Gemm) if op.epilogue == "add"]
    assert added == [0.22] * 6
    model, tokens = model_of("granite-g3"), prompt("granite-g3")
    one = in_chunks(model.reference(), tokens, 1, range(3))
    assert relative_error(one, prefill(model.reference(), tokens)) < 1e-9


def test_17_one_divides_the_logits_and_another_multiplies() -> None:
    head = {name: ops_of(plan_of(name), Gemm)[-1].scale for name in ("granite-odd", "cohere2-default")}
    assert head == {"granite-odd": 1 / 16, "cohere2-default": 0.0625}
    assert ops_of(plan_of("granite-odd"), Embed)[0].scale == 3.0


def test_18_one_over_the_root_is_lost_or_added_where_it_is_not() -> None:
    assert {op.scale for op in ops_of(plan_of("gemma4_text-e2b"), Attention)} == {1.0}
    assert {op.scale for op in ops_of(plan_of("llama-open-llama-head20-odd"), Attention)} == {20**-0.5}


def test_embedding_factor_is_rounded_as_the_weights_are() -> None:
    """sqrt(1152) is 33.94; in bf16 it is 34. 2304 and 3584: 48 and 59.75."""
    for dim, factor in ((1152, 34.0), (2304, 48.0), (3584, 59.75), (4608, 68.0), (640, 25.25), (5376, 73.5)):
        changes = {"hidden_size": dim, "head_dim": 32}
        assert spec_of("gemma2-caps", **changes).embed_scale == factor
        assert spec_of("gemma4_text-e2b", **changes).embed_scale == factor

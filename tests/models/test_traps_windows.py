"""Traps of masks, windows and attention (see traps.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ext.kit import pack_model
from golden import families, tiny
from golden.harness import (
    in_chunks,
    prefill,
    relative_error,
)
from models.traps import (
    FULL,
    SLIDING,
    TOLERANCE,
    FamilyModel,
    error_of,
    ops_of,
    plan_of,
    prompt,
    shapes_of,
    spec_of,
)

from pace import LLM, SamplingParams, ops
from pace.errors import UnsupportedModel
from pace.models.decoder import lower
from pace.models.plan import Attention, RopeKV

WINDOWED = [
    "mistral-window", "qwen2-upper-windows", "qwen3-windows", "gemma2-no-caps", "gemma3_text-pattern2",
    "gemma4_text-e2b", "phi3-mini4k", "olmo3-nested", "smollm3-layer-types", "exaone4-layer-types",
    "cohere2-layer-types", "ministral3-window",
]  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_01_02_window_is_one_token_too_long_or_short(
    name: str, model_of: FamilyModel, golden: dict[str, np.ndarray]
) -> None:
    model = model_of(name)
    windows = [layer.mixer.window for layer in model.spec.layers]
    for step in (-1, 1):
        changed = model.spec.with_mixers(window=[w and w + step for w in windows])
        assert error_of(replace(model, plan=lower(changed, 48)), name, golden) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["gemma2-no-caps", "gemma3_text-nested-ropes", "mistral-window"])
def test_03_04_what_left_every_window_changes_nothing(name: str, model_of: FamilyModel) -> None:
    kinds = {} if name.startswith("mistral") else {"layer_types": [SLIDING] * 3, "num_hidden_layers": 3}
    model, tokens = model_of(name, **kinds), prompt(name)
    other = [(tokens[0] + 1) % families.VOCAB_SIZE, *tokens[1:]]
    one, two = (prefill(model.reference(), t) for t in (tokens, other))
    reach = 3 * (spec_of(name, **kinds).layers[0].mixer.window or 0)
    np.testing.assert_array_equal(one[reach:], two[reach:])
    assert relative_error(one[:4], two[:4]) > 1e-3


@pytest.mark.parametrize("name", WINDOWED)
def test_05_decoding_ignores_the_window_of_prefill(name: str, model_of: FamilyModel) -> None:
    model, tokens = model_of(name), prompt(name)
    whole = prefill(model.reference(), tokens)
    split = in_chunks(model.reference(), tokens, 31, range(3))  # then 17 more than one window behind
    assert relative_error(split, whole) < 1e-9


@pytest.mark.parametrize("name", ["gemma3_text-defaults", "gemma4_unified_text-dense12b"])
def test_06_07_windows_of_every_layer_reach_the_plan(name: str) -> None:
    plan = plan_of(name)
    n = len(ops_of(plan, Attention))
    expected = [None if (i + 1) % 6 == 0 or (i == n - 1 and "gemma4" in name) else 10 for i in range(n)]
    assert [op.window for op in ops_of(plan, Attention)] == expected


@pytest.mark.parametrize(
    "name",
    ["gemma2-odd", "gemma3_text-nested-ropes", "olmo3-nested", "cohere2-layer-types", "exaone4-layer-types"],
)
def test_08_patterns_of_layers_are_hard_coded(name: str) -> None:
    rng = np.random.default_rng(8)
    for _ in range(3):
        kinds = [str(k) for k in rng.choice([FULL, SLIDING], 6)]
        plan = plan_of(name, num_hidden_layers=6, layer_types=kinds, sliding_window=13)
        assert [op.window for op in ops_of(plan, Attention)] == [13 if k == SLIDING else None for k in kinds]


def test_10_a_prefix_found_again_has_lost_its_window(tmp_path: Path) -> None:
    name = "gemma3_text-pattern2"
    tiny.write(name, tmp_path, families.CASES[name])
    tokens, greedy = prompt(name), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM(tmp_path, skip_tokenizer_init=True, max_model_len=64, kv_cache_type="paged", threads=1)
    try:
        first, again = (llm.generate([tokens], greedy)[0] for _ in range(2))
        llm.generate([[*tokens[:40], 5, 6, 7]], greedy)
        third = llm.generate([tokens], greedy)[0]
    finally:
        llm.close()
    assert again.num_cached_tokens and third.num_cached_tokens
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == third.outputs[0].token_ids


@pytest.mark.parametrize(("name", "own"), [("qwen3-head128", True), ("olmo2-mha", False)])
def test_33_34_norm_of_queries_is_over_a_head_or_over_all(
    name: str, own: bool, model_of: FamilyModel
) -> None:
    """Eight times one head changes nothing where each is normalised by itself, and everything where all are at once."""
    model = model_of(name)
    weights = dict(model.weights)
    head_dim = model.spec.layers[0].mixer.head_dim
    weights["layers.0.qkv"] = weights["layers.0.qkv"].copy()
    weights["layers.0.qkv"][:head_dim] *= 8
    error = relative_error(
        prefill(replace(model, weights=weights).reference(), prompt(name)),
        prefill(model.reference(), prompt(name)),
    )
    assert (error < 1e-4) if own else (error > 1e-2)


def test_35_qk_layernorm_is_skipped_in_silence() -> None:
    with pytest.raises(UnsupportedModel, match="qk_layernorm is True"):
        spec_of("phi-phi1", qk_layernorm=True)
    assert all(op.norm_scope == "head_own" for op in ops_of(plan_of("stablelm-s12b"), RopeKV))


def test_36_stablelm_2_12b_has_a_norm_per_head_of_160_columns() -> None:
    changes = {
        "hidden_size": 5120, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 13824,
    }  # fmt: skip
    shapes = shapes_of("stablelm-s12b", **changes)
    at = "model.layers.1.self_attn"
    assert shapes[f"{at}.q_layernorm.norms.31.weight"] == shapes[f"{at}.k_layernorm.norms.7.weight"] == (160,)
    assert f"{at}.k_layernorm.norms.8.weight" not in shapes
    assert shapes[f"{at}.k_proj.weight"] == (1280, 5120)


@pytest.mark.parametrize("name", ["phi-phi2", "qwen2-r1-distill"])
def test_37_large_scores_overflow(name: str, team: ops.Team, model_of: FamilyModel) -> None:
    model = model_of(name, gain=300.0)  # scores of 1e5 and more
    assert np.isfinite(prefill(pack_model(team, model).runner(team), prompt(name))).all()


def test_39_gemma_4_has_two_widths_of_heads() -> None:
    changes = {
        "hidden_size": 3840, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_hidden_layers": 6,
    }  # fmt: skip
    shapes = shapes_of("gemma4_unified_text-dense12b", **changes)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (3840, 4096)
    assert shapes["model.layers.5.self_attn.o_proj.weight"] == (3840, 8192)
    assert shapes["model.layers.5.self_attn.k_proj.weight"] == (512, 3840)
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu"])
def test_48_decoding_uses_another_activation(act: str, team: ops.Team, model_of: FamilyModel) -> None:
    packed, tokens = (
        pack_model(team, model_of("llama-odd-stream", hidden_act=act)),
        prompt("llama-odd-stream")[:20],
    )
    one = in_chunks(packed.runner(team), tokens, 1, range(2))
    assert one.tobytes() == prefill(packed.runner(team), tokens).tobytes()


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_limit_list", "expert_limits", "altup_num_inputs", "index_topk",
                                 "linear_num_key_heads", "mamba_d_state", "kv_lora_rank", "use_bidirectional_attention",
                                 "attn_output_gate", "per_layer_config"])  # fmt: skip
def test_49_keys_of_unknown_blocks_are_overlooked(key: str) -> None:
    value: Any = {"0": {"head_dim": 8}} if key == "per_layer_config" else True
    with pytest.raises(UnsupportedModel, match=key):
        spec_of("llama-odd-stream", **{key: value})

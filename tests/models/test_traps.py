"""Traps that other engines fell into (numbers as in the notes on models): one test each, named after the trap.

Those of layouts of experts are in test_expert_layouts.py, those of tokens and chats in tests/text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ext.kit import pack_model
from golden import families, tiny
from golden.harness import (
    BLOCK_SIZE,
    Model,
    apart,
    bf16_tolerance,
    choices_of,
    followed,
    in_chunks,
    load,
    prefill,
    relative_error,
)

from pace import LLM, SamplingParams, ops
from pace.errors import CheckpointError, PaceError, UnsupportedModel, WeightsError
from pace.models import rope
from pace.models.decoder import lower
from pace.models.plan import Attention, Embed, ExpertsIn, ExpertsOut, Gemm, Plan, RopeKV, Route
from pace.models.registry import ARCHITECTURES, parse_config
from pace.models.spec import DecoderSpec, MoESpec
from pace.models.weights import tensor_shapes
from pace.reference import rotate, route

FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 3e-5

FamilyModel = Callable[..., Model]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A case's config with some keys changed; `...` removes one."""
    return {k: v for k, v in {**families.CASES[name].config, **changes}.items() if v is not ...}


def spec_of(name: str, **changes: Any) -> DecoderSpec:
    return parse_config(config_of(name, **changes))[0]


def plan_of(name: str, **changes: Any) -> Plan:
    return lower(spec_of(name, **changes), 48)


def ffns(name: str) -> list[object]:
    return [layer.ffn for layer in spec_of(name).layers]


def ops_of(plan: Plan, kind: type) -> list[Any]:
    return [op for op in plan.ops if isinstance(op, kind)]


def prompt(name: str) -> list[int]:
    return tiny.prompt(name, families.VOCAB_SIZE)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    """model_of(name, **changes): a case with its config changed, loaded once."""
    loaded: dict[str, Model] = {}

    def get(name: str, gain: float = 1.0, **changes: Any) -> Model:
        key = f"{name} {gain} {sorted(changes.items())!r}"
        if key not in loaded:
            case = replace(families.CASES[name], config=config_of(name, **changes), gain=gain)
            loaded[key] = load(tiny.write(name, tmp_path_factory.mktemp("trap"), case), 48)
        return loaded[key]

    return get


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(families.GOLDEN_FILE) as file:
        return {name: file[name] for name in file.files}


def error_of(model: Model, name: str, golden: dict[str, np.ndarray], **changes: Any) -> float:
    """Distance of a model (with its plan changed) from transformers' logits."""
    logits = prefill(model.reference(**changes), prompt(name))
    return relative_error(logits[list(tiny.GOLDEN_ROWS)], golden[name])


def with_ops(plan: Plan, kind: type, change: Callable[[Any], dict[str, Any]]) -> tuple[Any, ...]:
    """The plan's operators, those of a kind with some fields changed."""
    return tuple(replace(op, **change(op)) if isinstance(op, kind) else op for op in plan.ops)


# ---- masks and windows ------------------------------------------------------------------------------------

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


# ---- scales, caps, multipliers ----------------------------------------------------------------------------


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
    logits = prefill(model_of(name).reference(), tokens)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for i in range(1, 20):
        assert scored[i][tokens[i]].logprob == pytest.approx(expected[i - 1, tokens[i]], abs=0.2)


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


# ---- rope -------------------------------------------------------------------------------------------------

ROTARY = ["llama-odd-stream", "mistral-window", "qwen2-r1-distill", "qwen3-head24-odd", "gemma2-no-caps", "phi-phi1",
          "phi3-mini4k", "olmo2-mha", "granite-plain", "smollm3-interval", "stablelm-s3b", "hunyuan_v1_dense-plain",
          "seed_oss-default-bias", "exaone4-pattern", "glm4-default", "ernie4_5-default", "cohere2-default"]  # fmt: skip


@pytest.mark.parametrize("name", ROTARY)
def test_19_theta_is_lost_between_two_spellings(name: str) -> None:
    share = families.CASES[name].config.get("partial_rotary_factor")
    new = {"rope_type": "default", "rope_theta": 777.0, **({"partial_rotary_factor": share} if share else {})}
    old = spec_of(name, rope_theta=777.0, rope_parameters=..., rope_scaling=...)
    parameters = spec_of(name, rope_theta=..., rope_scaling=..., rope_parameters=new)
    assert old.ropes == parameters.ropes
    assert old.ropes[0].theta == 777.0


def test_20_original_length_is_replaced_by_the_extended_one() -> None:
    assert spec_of("ministral3-three").ropes[0].original_len == 16
    assert spec_of("phi3-mini4").ropes[0].original_len == 32  # the top level's
    assert spec_of("llama-r1-distill").ropes[0].original_len == 16


def test_21_scaling_lands_on_the_wrong_layers() -> None:
    for name in ("gemma3_text-pattern2", "olmo3-yarn-on-full-layers"):
        spec = spec_of(name)
        assert [r.kind for r in spec.ropes] == ["linear" if "gemma" in name else "yarn", "default"]
        for layer in spec.layers:
            assert layer.mixer.rope == (0 if layer.mixer.window is None else 1)
        full, sliding = (rope.build(r, 4096) for r in spec.ropes)
        assert not np.array_equal(full.inv_freq, sliding.inv_freq)
    assert [r.theta for r in spec_of("gemma3_text-pattern2").ropes] == [1e6, 100.0]


def test_22_gemma_4_turns_a_prefix_instead_of_two_half_prefixes() -> None:
    table = rope.build(spec_of("gemma4_text-e2b").ropes[0], 48)  # 48 columns, a quarter of the pairs
    x = np.random.default_rng(0).standard_normal((1, 1, 48))
    turned = np.nonzero(rotate(x, np.array([5], np.int32), table)[0, 0] != x[0, 0])[0]
    assert turned.tolist() == [*range(6), *range(24, 30)]


def test_23_llama3_is_taken_for_linear() -> None:
    spec = replace(spec_of("llama-r1-distill").ropes[0], original_len=64)
    table, plain = rope.build(spec, 48).inv_freq, rope.build(replace(spec, kind="default"), 48).inv_freq
    assert table[0] == plain[0]
    assert table[-1] == pytest.approx(plain[-1] / 8)
    assert ((plain / 8 <= table) & (table <= plain)).all()


def test_26_partial_rotation_and_tied_head_of_phi_4_mini_are_ignored() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    changes = {
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "rope_scaling": {"type": "longrope", **factors},
    }
    spec = spec_of("phi3-mini4", **changes)
    assert (spec.ropes[0].rotary_dim, len(spec.ropes[0].long_factor), spec.tied) == (96, 48, True)


def test_27_28_two_sets_of_long_factors_in_one_sequence(model_of: FamilyModel) -> None:
    """One table per engine, by its longest sequence: crossing the original length equals a run that never switched."""
    model, tokens = model_of("phi3-mini4"), prompt("phi3-mini4")
    whole = prefill(model.reference(), tokens)
    assert relative_error(in_chunks(model.reference(), tokens, 5, range(3)), whole) < 1e-9
    short, long = (rope.build(spec_of("phi3-mini4").ropes[0], n).inv_freq for n in (32, 33))
    assert short[-1] > long[-1]


def test_29_smollm3_reads_its_flag_the_other_way_round() -> None:
    flags = [op.rope for op in ops_of(plan_of("smollm3-default-nope"), RopeKV)]
    assert flags == [0, 0, 0, None, 0]
    given = ops_of(plan_of("smollm3-default-nope", no_rope_layers=[1, 1, 1, 0, 0]), RopeKV)
    assert [op.rope for op in given] == [0, 0, 0, None, None]


@pytest.mark.parametrize("name", ["phi-phi2", "gptj-small", "glm4-default", "ernie4_5-odd", "stablelm-s3b"])
def test_30_pairs_are_neighbours_or_halves_and_widths_partial(
    name: str, model_of: FamilyModel, golden: dict[str, np.ndarray]
) -> None:
    model = model_of(name)
    table = model.plan.ropes[0]
    mirrored = replace(table, interleaved=not table.interleaved)
    assert error_of(model, name, golden, ropes=(mirrored,)) > 100 * TOLERANCE


def test_31_a_long_context_sizes_a_table() -> None:
    spec = spec_of("llama-odd-stream", max_position_embeddings=10485760)
    assert spec.max_len == 10485760
    assert lower(spec, 48).ropes[0].inv_freq.shape == (12,)


def test_32_equal_frequency_factors_divide_by_zero() -> None:
    spec = spec_of("llama-hard-switch").ropes[0]
    table, plain = rope.build(spec, 48).inv_freq, rope.build(replace(spec, kind="default"), 48).inv_freq
    assert np.isfinite(table).all()
    assert set(np.round(plain / table).tolist()) == {1.0, 8.0}  # a step, nothing between


# ---- attention --------------------------------------------------------------------------------------------


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


def shapes_of(name: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint with this config."""
    spec, weight_map = parse_config(config_of(name, **changes))
    found = tensor_shapes(lower(spec, 48), weight_map, len(spec.layers))
    return {name: tensor.shape for name, tensor in found.items()}


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


# ---- Gemma 4 and files ------------------------------------------------------------------------------------


def test_51_per_layer_embeddings_are_not_in_the_graph(model_of: FamilyModel) -> None:
    model, name = model_of("gemma4_text-e2b"), "gemma4_text-e2b"
    whole = prefill(model.reference(), prompt(name))
    for weight in ("inputs.table", "inputs.proj", "layers.5.input_gate", "layers.0.scalar"):
        zero = {**model.weights, weight: np.zeros_like(model.weights[weight])}
        changed = prefill(replace(model, weights=zero).reference(), prompt(name))
        assert relative_error(changed, whole) > 1e-3, weight


def test_52_keys_of_layers_that_share_others_are_missed_or_unexpected(tmp_path: Path) -> None:
    name = "gemma4_text-e2b"
    case = families.CASES[name]
    want = prefill(load(tiny.write(name, tmp_path, case), 48).reference(), prompt(name))
    arrays = tiny.tensors(name, case)
    for tensor in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
        arrays[f"model.layers.5.self_attn.{tensor}"] = arrays[f"model.layers.3.self_attn.{tensor}"]
    tiny.write_safetensors(tmp_path / "model.safetensors", arrays)
    np.testing.assert_array_equal(prefill(load(tmp_path, 48).reference(), prompt(name)), want)


@pytest.mark.parametrize(
    ("prefix", "loads"),
    [
        ("model.", True),
        ("model.language_model.", True),
        ("language_model.model.", True),
        ("model.language_model.model.", True),
        ("language.model.", False),
    ],
)
def test_53_a_prefix_leaves_random_weights(prefix: str, loads: bool, tmp_path: Path) -> None:
    name = "gemma3-tower"
    tiny.write(name, tmp_path, families.CASES[name])
    arrays = {
        key.replace("model.language_model.", prefix): value
        for key, value in tiny.tensors(name, families.CASES[name]).items()
    }
    arrays["vision_tower.vision_model.embeddings.patch_embedding.weight"] = np.zeros(4, np.uint16)
    arrays["multi_modal_projector.mm_input_projection_weight"] = np.zeros(4, np.uint16)
    tiny.write_safetensors(tmp_path / "model.safetensors", arrays)
    if loads:
        assert np.isfinite(prefill(load(tmp_path, 48).reference(), prompt(name)[:8])).all()
    else:
        with pytest.raises(WeightsError, match="missing"):
            load(tmp_path, 48)


def test_54_opt_350m_has_projections_and_neither_final_norm_nor_prefix(tmp_path: Path) -> None:
    shapes = shapes_of("opt-m350")
    assert shapes["model.decoder.project_in.weight"] == (64, 32)
    assert shapes["model.decoder.project_out.weight"] == (32, 64)
    assert shapes["model.decoder.embed_tokens.weight"] == (211, 32)
    assert "model.decoder.final_layer_norm.weight" not in shapes
    assert "model.decoder.final_layer_norm.weight" in shapes_of("opt-m125")
    big = shapes_of(
        "opt-m125", hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_attention_heads=32
    )
    assert big["model.decoder.embed_positions.weight"] == (66, 4096)
    case = families.CASES["opt-m350"]
    tiny.write("opt-m350", tmp_path, case)
    bare = {key.removeprefix("model."): value for key, value in tiny.tensors("opt-m350", case).items()}
    tiny.write_safetensors(tmp_path / "model.safetensors", bare)
    assert np.isfinite(prefill(load(tmp_path, 48).reference(), prompt("opt-m350")[:BLOCK_SIZE])).all()


@pytest.mark.parametrize("name", ["granite-plain", "phi-phi1", "gemma3_text-pattern2"])
def test_59_logits_are_wider_than_the_vocabulary(name: str, team: ops.Team, model_of: FamilyModel) -> None:
    packed = pack_model(team, model_of(name))
    assert prefill(packed.runner(team), prompt(name)[:3]).shape == (3, 211)


# ---- experts, Llama 4, gpt-oss ----------------------------------------------------------------------------


def changed(model: Model, end: str, change: Callable[[np.ndarray], np.ndarray]) -> Model:
    """The model with the weights whose names end like this put through a function."""
    return replace(model, weights={n: change(w) if n.endswith(end) else w for n, w in model.weights.items()})


def test_09_the_layers_that_rotate_are_the_chunked_ones(
    model_of: FamilyModel, golden: dict[str, np.ndarray]
) -> None:
    name = "llama4_text-scout"
    model = model_of(name)
    mixers = [layer.mixer for layer in model.spec.layers]
    assert [(m.rope, m.chunk) for m in mixers] == [(0, 12)] * 3 + [(None, None)] + [(0, 12)]
    swapped = model.spec.with_mixers(chunk=[None if m.chunk else 12 for m in mixers])
    assert error_of(replace(model, plan=lower(swapped, 48)), name, golden) > 10 * TOLERANCE


def test_09_a_query_behind_a_chunks_border_sees_its_own_chunk_alone(model_of: FamilyModel) -> None:
    name = "llama4_text-scout"
    model = model_of(name, num_hidden_layers=1)
    tokens = prompt(name)
    other = [(t + 1) % families.VOCAB_SIZE for t in tokens[:12]] + tokens[12:]
    one, two = (prefill(model.reference(), t) for t in (tokens, other))
    assert relative_error(one[12:], two[12:]) < 1e-12  # experts multiply other numbers of rows
    assert relative_error(one[:12], two[:12]) > 1e-3


def test_06_gpt_oss_windows_of_every_other_layer_reach_the_plan() -> None:
    assert [op.window for op in ops_of(plan_of("gpt_oss-small"), Attention)] == [8, None, 8]


def test_20_the_original_length_of_gpt_oss_is_not_the_extended_one(
    model_of: FamilyModel, golden: dict[str, np.ndarray]
) -> None:
    name = "gpt_oss-small"
    model = model_of(name)
    wrong = tuple(replace(r, original_len=r.max_len) for r in model.spec.ropes)
    assert error_of(replace(model, plan=lower(replace(model.spec, ropes=wrong), 48)), name, golden) > 1e-3


def test_31_ten_million_positions_size_nothing() -> None:
    plan = lower(spec_of("llama4_text-scout", max_position_embeddings=10485760), 48)
    assert sum(slot.width for slot in plan.slots.values()) < 10_000
    assert sum(len(r.inv_freq) for r in plan.ropes) == 8


def test_32_equal_factors_make_a_step() -> None:
    table = plan_of("llama4_text-scout").ropes[0].inv_freq
    plain = plan_of("llama4_text-scout", rope_scaling=...).ropes[0].inv_freq
    assert np.isfinite(table).all() and set(np.round(plain / table).astype(int)) == {1, 8}


def test_33_the_norm_of_llama4_is_of_each_head_and_behind_the_rotation(
    model_of: FamilyModel, golden: dict[str, np.ndarray]
) -> None:
    name = "llama4_text-scout"
    model = model_of(name)
    rotating = [op.rope is not None for op in ops_of(model.plan, RopeKV)]
    assert [op.qk_norm == "rms" and op.norm_after_rope for op in ops_of(model.plan, RopeKV)] == rotating
    for change in ({"norm_scope": "full"}, {"qk_norm": "none"}):
        ops = with_ops(model.plan, RopeKV, lambda op, c=change: c if op.qk_norm != "none" else {})
        assert error_of(model, name, golden, ops=ops) > 10 * TOLERANCE


def test_38_sinks_are_bound(model_of: FamilyModel) -> None:
    model, tokens = model_of("gpt_oss-small"), prompt("gpt_oss-small")
    plain = prefill(model.reference(), tokens)
    without = with_ops(model.plan, Attention, lambda op: {"sinks": None})
    none = prefill(model.reference(ops=without), tokens)
    for value in (20.0, -20.0, 0.0):
        other = changed(model, ".sinks", lambda w, v=value: np.full_like(w, v))
        assert relative_error(prefill(other.reference(), tokens), plain) > 1e-3
    gone = changed(model, ".sinks", lambda w: np.full_like(w, -np.inf))
    np.testing.assert_array_equal(prefill(gone.reference(), tokens), none)


FLAGGED = ["qwen2_moe-plain", "qwen3_moe-absent-flag", "olmoe-plain", "glm4_moe-air", "sarvam_moe-s30b"]


@pytest.mark.parametrize("name", FLAGGED)
def test_40_both_values_of_norm_topk_prob_reach_the_router(name: str, model_of: FamilyModel) -> None:
    logits = [prefill(model_of(name, norm_topk_prob=v).reference(), prompt(name)) for v in (False, True)]
    assert relative_error(logits[0], logits[1]) > 1e-3


@pytest.mark.parametrize("name", FLAGGED)
def test_41_an_absent_flag_means_what_the_family_says(name: str) -> None:
    routes = ops_of(plan_of(name, norm_topk_prob=...), Route)
    assert {op.renormalise for op in routes} == {name.startswith(("glm4", "sarvam"))}
    for always in ("mixtral-eight", "minimax_m2-m2", "gemma4_text-a4b"):
        assert all(op.renormalise for op in ops_of(plan_of(always), Route))


def test_42_the_softmax_stands_before_the_choice(model_of: FamilyModel) -> None:
    model = model_of("qwen2_moe-plain")
    reference = model.reference(trace=True)
    prefill(reference, prompt("qwen2_moe-plain"))
    assert reference.trace is not None
    weights = reference.trace["layers.0.router.choose"]["route"][:, 2:]
    assert (weights.sum(axis=-1) < 0.999).all() and weights.min() > 0


def test_43_the_factor_counts_without_renormalising_too(model_of: FamilyModel) -> None:
    name = "glm4_moe-groups"
    assert not ops_of(plan_of(name), Route)[0].renormalise
    one = prefill(model_of(name).reference(), prompt(name))
    two = prefill(model_of(name, routed_scaling_factor=1.0).reference(), prompt(name))
    assert relative_error(one, two) > 1e-2


@pytest.mark.parametrize("name", ["gpt_oss-small", "qwen3_moe-a3b", "llama4_text-scout", "mixtral-eight"])
def test_44_logits_that_are_all_negative_choose_the_same_experts(name: str, model_of: FamilyModel) -> None:
    spec = model_of(name).spec
    ffn = next(layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec))
    logits = np.random.default_rng(44).standard_normal((50, ffn.n_experts)) * 3
    op = next(op for op in ops_of(plan_of(name), Route))
    ids, weights = route(op, logits, None)
    low, low_weights = route(op, logits - 100, None)
    np.testing.assert_array_equal(low, ids)
    if op.order != "sigmoid":
        np.testing.assert_allclose(low_weights, weights, rtol=1e-9)


def test_ties_go_to_the_first_experts_whatever_the_order() -> None:
    for name in ("gpt_oss-small", "qwen3_moe-a3b", "llama4_text-lists", "glm4_moe-air"):
        op = ops_of(plan_of(name), Route)[0]
        n = plan_of(name).slots[op.src].width
        ids, _ = route(op, np.zeros((2, n)), None if op.choice is None else np.zeros(n))
        assert (np.sort(ids) == np.arange(op.top_k)).all()


def test_46_llama4_weighs_the_input(model_of: FamilyModel, golden: dict[str, np.ndarray]) -> None:
    name = "llama4_text-scout"
    model = model_of(name)
    ops = tuple(
        replace(op, on_input=False)
        if isinstance(op, ExpertsIn)
        else replace(op, weigh=True)
        if isinstance(op, ExpertsOut)
        else op
        for op in model.plan.ops
    )
    assert error_of(model, name, golden) < TOLERANCE
    assert error_of(model, name, golden, ops=ops) > 1e-3


@pytest.mark.parametrize("name", ["gemma4_text-a4b", "gemma4_text-moe-inputs", "glm4_moe-air"])
def test_47_experts_beside_an_mlp_count(name: str, model_of: FamilyModel) -> None:
    model, tokens = model_of(name), prompt(name)
    plain = prefill(model.reference(), tokens)
    for i, layer in enumerate(model.spec.layers):
        beside = f"layers.{i}.shared.down" if name.startswith("glm4") else f"layers.{i}.down"
        for part in (f"layers.{i}.experts.down", beside) if isinstance(layer.ffn, MoESpec) else ():
            other = changed(model, part, np.zeros_like)
            assert relative_error(prefill(other.reference(), tokens), plain) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe-a3b", "qwen3_moe-sparse", "gpt_oss-clamped", "gemma4_text-a4b"])
def test_48_decoding_has_the_activation_of_prefill(name: str, team: ops.Team, model_of: FamilyModel) -> None:
    packed, tokens = pack_model(team, model_of(name)), prompt(name)
    whole = prefill(packed.runner(team), tokens)
    assert in_chunks(packed.runner(team), tokens, 1, range(3)).tobytes() == whole.tobytes()


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_limits", "moe_limit_list", "swiglu_limit_shared"])
def test_49_limits_that_a_family_does_not_know_are_refused(key: str) -> None:
    for name in ("qwen3_moe-a3b", "glm4_moe-air", "llama-odd-stream"):
        with pytest.raises(UnsupportedModel, match=key):
            spec_of(name, **{key: 7.0})
    assert ops_of(plan_of("gpt_oss-small"), ExpertsIn)[0].limit == 7.0


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen3_moe-a3b", {"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ("qwen3_moe-a3b", {"num_local_experts": 15}, "num_local_experts"),
        ("qwen3_moe-a3b", {"n_shared_experts": 1}, "n_shared_experts"),
        ("qwen3_moe-a3b", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ("mixtral-eight", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("mixtral-eight", {"n_group": 4}, "n_group"),
        ("glm4_moe-air", {"n_group": 3}, "n_group"),
        ("glm4_moe-groups", {"topk_group": 5}, "topk_group"),
        ("glm4_moe-groups", {"num_experts_per_tok": 13}, "topk_group"),
        ("glm4_moe-air", {"scoring_func": "softmax"}, "scoring_func"),
        ("olmoe-plain", {"clip_qkv": 8.0}, "clip_qkv"),
        ("llama4_text-lists", {"attention_chunk_size": None}, "attention_chunk_size"),
        ("llama4_text-lists", {"moe_layers": [4]}, "moe_layers"),
        ("llama4_text-scout", {"layer_types": [SLIDING] * 5}, "layer_types"),
        ("gpt_oss-small", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt_oss-mxfp4", {"quantization_config": {"quant_method": "hqq"}}, "quant_method"),
        ("minimax_m2-m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list"),
    ],
)
def test_a_wrong_number_of_experts_or_groups_is_named(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec_of(name, **changes)


def test_a_prompt_of_hundreds_and_of_one_token(team: ops.Team, model_of: FamilyModel) -> None:
    """Experts with hundreds of rows, and with one."""
    for name in ("qwen3_moe-a3b", "gpt_oss-clamped", "llama4_text-maverick", "glm4_moe-groups"):
        model = apart(model_of(name))
        packed = pack_model(team, model)
        long = [int(t) for t in np.random.default_rng(4).integers(0, families.VOCAB_SIZE, 250)]
        for tokens in (long, long[:1]):
            runner = packed.runner(team)
            got = prefill(runner, tokens)
            want, rounded = (prefill(followed(model, choices_of(runner), r), tokens) for r in (None, "bf16"))
            limit = max(2 * relative_error(rounded, want), bf16_tolerance(len(model.spec.layers)))
            assert relative_error(got, want) < limit
            assert in_chunks(packed.runner(team), tokens, 33, range(16)).tobytes() == got.tobytes()


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n, a in ARCHITECTURES.items() if not a.text))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("num_local_experts", 8),
        ("kv_lora_rank", 512),
        ("text_config", {"a": 1}),
    ],
)
def test_an_option_of_another_family_is_named(name: str, key: str, value: object) -> None:
    case = next(n for n, c in families.CASES.items() if c.config["architectures"] == [name])
    if key == "num_local_experts" and any(isinstance(ffn, MoESpec) for ffn in ffns(case)):
        pytest.skip("its own key, which test_options.py alters")
    with pytest.raises(CheckpointError, match=key):
        spec_of(case, **{key: value})


def test_pickled_weights_are_told_how_to_become_safetensors(tmp_path: Path) -> None:
    directory = tiny.write("opt-m125", tmp_path / "opt-125m", families.CASES["opt-m125"])
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"from_pretrained\('opt-125m', dtype='auto'\)\.save_pretrained"
    ):
        load(directory, 48)


def test_an_image_is_refused_by_its_name() -> None:
    llm = LLM("demo", threads=1)
    try:
        parts = [{"type": "image_url", "image_url": {"url": "x"}}]
        with pytest.raises(PaceError, match="image_url"):
            llm.chat([{"role": "user", "content": parts}])
    finally:
        llm.close()

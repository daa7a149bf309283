"""Traps of experts, Llama 4 and gpt-oss (see traps.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from ext.kit import pack_model
from golden import families
from golden.harness import (
    Model,
    apart,
    bf16_tolerance,
    choices_of,
    followed,
    in_chunks,
    prefill,
    relative_error,
)
from models.traps import (
    SLIDING,
    TOLERANCE,
    FamilyModel,
    error_of,
    ops_of,
    plan_of,
    prompt,
    spec_of,
    with_ops,
)

from pace import ops
from pace.errors import CheckpointError, UnsupportedModel
from pace.models.decoder import lower
from pace.models.plan import Attention, ExpertsIn, ExpertsOut, RopeKV, Route
from pace.models.spec import MoESpec
from pace.reference import route


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

        def changes(op: RopeKV, change: dict[str, str] = change) -> dict[str, str]:
            return change if op.qk_norm != "none" else {}

        ops = with_ops(model.plan, RopeKV, changes)
        assert error_of(model, name, golden, ops=ops) > 10 * TOLERANCE


def test_38_sinks_are_bound(model_of: FamilyModel) -> None:
    model, tokens = model_of("gpt_oss-small"), prompt("gpt_oss-small")
    plain = prefill(model.reference(), tokens)
    without = with_ops(model.plan, Attention, lambda op: {"sinks": None})
    none = prefill(model.reference(ops=without), tokens)
    for value in (20.0, -20.0, 0.0):
        other = changed(model, ".sinks", partial(np.full_like, fill_value=value))
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

"""Traps of rotary positions (see traps.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden import families
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
)

from pace.models import rope
from pace.models.decoder import lower
from pace.models.plan import RopeKV
from pace.reference import rotate

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

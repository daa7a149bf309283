"""Rotary embeddings: tables against transformers, rotations against complex multiplication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from golden import tiny
from golden.harness import Model, prefill, relative_error

from pace.errors import CheckpointError
from pace.models import rope
from pace.models.config import Config
from pace.models.plan import Rope, RopeKV
from pace.models.spec import RopeSpec
from pace.reference import rotate

BASE: dict[str, Any] = {"max_position_embeddings": 4096, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0 + i / 50 for i in range(64)], "long_factor": [1.0 + i for i in range(64)]}

# name -> (rope parameters, head_dim 128)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-no-truncate": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "truncate": False,
        "beta_fast": 24.0,
        "beta_slow": 3.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 0.75,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS},
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "factor": 4.0,
        "attention_factor": 1.1,
        "original_max_position_embeddings": 1024,
        **FACTORS,
    },
}


def parse(parameters: dict[str, Any], head_dim: int = 128, **options: Any) -> RopeSpec:
    return rope.parse(Config({**BASE, "rope_scaling": parameters}), head_dim, **options)


@pytest.mark.live
@pytest.mark.parametrize("max_model_len", [1024, 4096, 10000])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "default"])
def test_frequencies_match_transformers(name: str, max_model_len: int) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, **VARIANTS[name]},
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[VARIANTS[name]["rope_type"]](
        config, "cpu", seq_len=max_model_len
    )
    table = rope.build(parse(VARIANTS[name]), max_model_len)
    assert table.inv_freq.dtype == np.float32
    # float32 powers and products in transformers: a few units in the last place.
    np.testing.assert_allclose(table.inv_freq, inv_freq.numpy(), rtol=1e-6)
    assert table.attention_factor == pytest.approx(attention_factor, rel=1e-9)


@pytest.mark.live
def test_partial_frequencies_match_transformers() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

    config = transformers.StableLmConfig(
        hidden_size=320,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    spec = parse({"rope_type": "default", "partial_rotary_factor": 0.25}, head_dim=80, share=1.0)
    table = rope.build(spec, 4096)
    assert table.rotary_dim == 20
    np.testing.assert_allclose(table.inv_freq, StableLmRotaryEmbedding(config).inv_freq.numpy(), rtol=1e-6)


@pytest.mark.live
def test_interleaved_rotation_matches_transformers() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.glm import modeling_glm

    apply_rotary_pos_emb: Any = modeling_glm.apply_rotary_pos_emb
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 3, 64))  # [T, heads, head_dim]
    positions = np.arange(5, 14, dtype=np.int32)
    table = Rope((1e4 ** -(np.arange(0, 32, 2) / 32)).astype(np.float32), 1.0, True, 32)
    angle = torch.tensor(positions[:, None].astype(np.float32) * table.inv_freq).double()
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[None] for f in (torch.cos, torch.sin))
    q = torch.tensor(x).permute(1, 0, 2)[None]
    want, _ = apply_rotary_pos_emb(q, q, cos, sin)
    np.testing.assert_allclose(rotate(x, positions, table), want[0].permute(1, 0, 2).numpy(), atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (48, 20)])
def test_rotation_is_complex_multiplication(interleaved: bool, head_dim: int, rotary_dim: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 2, head_dim))
    positions = np.array([0, 1, 2, 100, 5000, 131071, 3], np.int32)
    inv_freq = (1e4 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
    table = Rope(inv_freq, 1.25, interleaved, rotary_dim)
    got = rotate(x, positions, table)
    turn = 1.25 * np.exp(1j * (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64))
    half = rotary_dim // 2
    i = np.arange(half)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    want = (x[..., first] + 1j * x[..., second]) * turn[:, None, :]
    np.testing.assert_allclose(got[..., first], want.real, atol=1e-12)
    np.testing.assert_allclose(got[..., second], want.imag, atol=1e-12)
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


def test_tables_depend_on_the_engine_not_on_the_sequence() -> None:
    """dynamic and longrope: one table below the threshold, another above; other kinds never change."""
    for name, parameters in VARIANTS.items():
        spec = parse(parameters)
        short, long = rope.build(spec, 1000).inv_freq, rope.build(spec, 9000).inv_freq
        assert np.array_equal(short, long) == (not name.startswith(("dynamic", "longrope"))), name
    longrope = parse(VARIANTS["longrope"])
    at, above = rope.build(longrope, 1024).inv_freq, rope.build(longrope, 1025).inv_freq
    assert not np.array_equal(at, above)


def test_top_level_original_length_has_priority() -> None:
    config = Config({**BASE, "original_max_position_embeddings": 512, "rope_scaling": VARIANTS["longrope"]})
    assert rope.parse(config, 128).original_len == 512


def test_per_layer_type_parameters() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Config({"max_position_embeddings": 4096, "rope_parameters": nested})
    full = rope.parse(config, 128, layer_type="full_attention")
    sliding = rope.parse(config, 128, layer_type="sliding_attention")
    assert (full.kind, full.theta, full.factor) == ("linear", 1e6, 8.0)
    assert (sliding.kind, sliding.theta) == ("default", 1e4)
    with pytest.raises(CheckpointError, match="'global'"):
        rope.parse(config, 128, layer_type="global")


def test_layers_use_their_own_table(golden_model: Callable[[str], Model]) -> None:
    """A model whose layers differ in theta computes with both: swapping the tables changes the result."""
    from pace.models.decoder import lower

    model = golden_model("llama-mha")
    other = replace(model.spec.ropes[0], theta=500.0)
    spec = replace(model.spec, ropes=(model.spec.ropes[0], other)).with_mixers(rope=[0, 1])
    plan = lower(spec, 64)
    assert [op.rope for op in plan.ops if isinstance(op, RopeKV)] == [0, 1]
    tokens = tiny.prompt("llama-mha")
    one, two = (prefill(m.reference(), tokens) for m in (model, replace(model, plan=plan)))
    swapped = prefill(replace(model, plan=replace(plan, ropes=plan.ropes[::-1])).reference(), tokens)
    np.testing.assert_array_equal(one[0], two[0])  # position 0 does not rotate
    assert relative_error(two, one) > 1e-2
    assert relative_error(two, swapped) > 1e-2


def test_sequences_that_differ_from_transformers_are_told() -> None:
    """dynamic and longrope choose by max_model_len, transformers by the length of each sequence."""
    dynamic, longrope = parse(VARIANTS["dynamic"]), parse(VARIANTS["longrope"])
    for spec, threshold in ((dynamic, dynamic.max_len), (longrope, 1024)):
        assert rope.length_note(spec, threshold) is None and rope.length_note(spec, 1) is None
        note = rope.length_note(spec, threshold + 1)
        assert note is not None and f"max_model_len {threshold} none" in note and str(threshold + 1) in note
    assert rope.length_note(replace(longrope, long_factor=longrope.short_factor), 1025) is None
    others = [
        parse(values) for name, values in VARIANTS.items() if not name.startswith(("dynamic", "longrope"))
    ]
    assert len(others) > 3 and all(rope.length_note(spec, 1 << 20) is None for spec in others)

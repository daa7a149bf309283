"""Traps of tensor names, shared layers and refused options (see traps.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ext.kit import pack_model
from golden import families, tiny
from golden.harness import (
    BLOCK_SIZE,
    load,
    prefill,
    relative_error,
)
from models.traps import (
    FamilyModel,
    ffns,
    prompt,
    shapes_of,
    spec_of,
)

from pace import LLM, ops
from pace.errors import CheckpointError, PaceError, WeightsError
from pace.models.registry import ARCHITECTURES
from pace.models.spec import MoESpec


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

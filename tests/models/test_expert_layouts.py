"""Every layout of experts on disk loads to the same weights, streaming; what is missing, left over or of another shape is
named.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from golden import families, tiny
from models.test_weights import Memory, NoSink

from pace.errors import WeightsError
from pace.models.decoder import lower
from pace.models.plan import Plan, gated_rows
from pace.models.registry import parse_config
from pace.models.tensors import to_f32
from pace.models.weights import DenseSink, Tensors, load_weights
from pace.reference import dequantise_mxfp4

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

NAMES = ["qwen3_moe-a3b", "mixtral-eight", "granitemoe-odd", "gemma4_text-a4b", "llama4_text-scout"]
STACKED = re.compile(r"(?P<at>.*\.experts)\.(?P<which>gate_up_proj|down_proj)")


def plan_of(name: str) -> tuple[Plan, Any, int]:
    spec, weight_map = parse_config(families.CASES[name].config)
    return lower(spec, 48), weight_map, len(spec.layers)


def loaded(name: str, arrays: Arrays) -> dict[str, Array]:
    plan, weight_map, n_layers = plan_of(name)
    checkpoint, sink = Memory(arrays), DenseSink()
    load_weights(plan, Tensors(checkpoint, weight_map, n_layers), sink)
    assert checkpoint.peak <= 2 and not checkpoint.alive  # blocks and their scales at most
    return sink.weights


def refused(name: str, arrays: Arrays) -> str:
    plan, weight_map, n_layers = plan_of(name)
    with pytest.raises(WeightsError) as caught:
        load_weights(plan, Tensors(Memory(arrays), weight_map, n_layers), NoSink())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def stacked(arrays: Arrays) -> Arrays:
    """A file with a tensor for each expert, as transformers 5 saves it anew: one for all, [E, 2 f, d] and [E, d, f]."""
    out: Arrays = {}
    experts: dict[str, dict[int, dict[str, Array]]] = {}
    for name, array in arrays.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            out[name] = array
        else:
            experts.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = array
    for at, own in experts.items():
        gate, up, down = (
            ("gate_proj", "up_proj", "down_proj") if "gate_proj" in own[0] else ("w1", "w3", "w2")
        )
        out[f"{at}.gate_up_proj"] = np.stack(
            [np.concatenate((e[gate], e[up])) for _, e in sorted(own.items())]
        )
        out[f"{at}.down_proj"] = np.stack([e[down] for _, e in sorted(own.items())])
    return out


def transposed(arrays: Arrays) -> Arrays:
    """The same with columns first."""
    return {
        name: np.ascontiguousarray(a.transpose(0, 2, 1)) if STACKED.fullmatch(name) and a.ndim == 3 else a
        for name, a in arrays.items()
    }


def each(arrays: Arrays, names: tuple[str, str, str]) -> Arrays:
    """Files of [E, 2 f, d] and [E, d, f] with a tensor for each expert."""
    out: Arrays = {}
    for name, array in arrays.items():
        found = STACKED.fullmatch(name)
        if found is None:
            out[name] = array
            continue
        for e, one in enumerate(array):
            if found["which"] == "down_proj":
                out[f"{found['at']}.{e}.{names[2]}.weight"] = one
            else:
                gate, up = np.split(one, 2)
                out[f"{found['at']}.{e}.{names[0]}.weight"] = gate
                out[f"{found['at']}.{e}.{names[1]}.weight"] = up
    return out


def unified(name: str) -> Arrays:
    """The case's tensors with experts as [E, 2 f, d] and [E, d, f]."""
    arrays = stacked(dict(tiny.tensors(name, families.CASES[name])))
    arrays = {
        n.replace("input_linear.weight", "experts.gate_up_proj").replace(
            "output_linear.weight", "experts.down_proj"
        ): a
        for n, a in arrays.items()
    }
    return transposed(arrays) if name.startswith("llama4") else arrays


@pytest.mark.parametrize("name", NAMES)
def test_45_every_layout_loads_to_the_same_weights(name: str) -> None:
    want = loaded(name, dict(tiny.tensors(name, families.CASES[name])))
    fused = unified(name)
    first = each(fused, ("gate_proj", "up_proj", "down_proj"))
    second = each(fused, ("w1", "w3", "w2"))
    # One file may mix them: by layer, and even the two halves of one layer.
    of_layer = [{n: a for n, a in kind.items() if ".layers.1." not in n} for kind in (fused, first)]
    other = [{n: a for n, a in kind.items() if ".layers.1." in n} for kind in (second, transposed(fused))]
    for arrays in (fused, transposed(fused), first, second, of_layer[0] | other[0], of_layer[1] | other[1]):
        assert_same(loaded(name, arrays), want)


@pytest.mark.parametrize("name", ["mixtral-eight", "minimax_m2-m2"])
def test_re_saved_blocks_have_another_name(name: str) -> None:
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    assert_same(
        loaded(name, {n.replace(".block_sparse_moe.", ".mlp."): a for n, a in arrays.items()}),
        loaded(name, arrays),
    )


def test_original_names_of_sarvam() -> None:
    name = "sarvam_moe-original-keys"
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    original: Arrays = {}
    names = {"embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense"}
    names |= {"gate.e_score_correction_bias": "gate.expert_bias"}
    for tensor, array in arrays.items():
        for old, new in names.items():
            tensor = tensor.replace(old, new)
        original[tensor] = array
    for i in range(3):
        for end in ("weight", "bias"):
            parts = [original.pop(f"model.layers.{i}.self_attn.{p}_proj.{end}") for p in "qkv"]
            original[f"model.layers.{i}.attention.query_key_value.{end}"] = np.concatenate(parts)
    assert_same(loaded(name, original), loaded(name, arrays))


def test_interleaved_rows_of_gpt_oss_land_where_the_plan_says() -> None:
    name = "gpt_oss-small"
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    weights, at = loaded(name, arrays), "model.layers.1.mlp.experts"
    source = to_f32(arrays[f"{at}.gate_up_proj"], "bf16")  # [E, d, 2 f]
    bias = to_f32(arrays[f"{at}.gate_up_proj_bias"], "bf16")  # [E, 2 f]
    for turn, part in enumerate(("gate", "up")):
        rows = gated_rows(72, part)  # type: ignore[arg-type]  # a part of the two
        np.testing.assert_array_equal(
            weights["layers.1.experts.gate_up"][:, rows], source[:, :, turn::2].transpose(0, 2, 1)
        )
        np.testing.assert_array_equal(weights["layers.1.experts.gate_up.bias"][:, rows], bias[:, turn::2])


def test_50_low_nibbles_come_first() -> None:
    """One block with all codes: column 2 j is the low nibble of byte j, 2 j + 1 the high one."""
    codes = np.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).astype(np.uint8).reshape(1, 1, 16)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    want = np.array([*values, *(-v for v in values)] * 2, np.float32)
    for scale in (127, 130, 100):
        got = to_f32(blocks, "mxfp4", np.array([[scale]], np.uint8))
        np.testing.assert_array_equal(got, [want * 2.0 ** (scale - 127)])


def test_blocks_load_to_what_they_stand_for() -> None:
    name = "gpt_oss-mxfp4"
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    weights, at = loaded(name, arrays), "model.layers.0.mlp.experts"
    down = dequantise_mxfp4(arrays[f"{at}.down_proj_blocks"], arrays[f"{at}.down_proj_scales"])
    np.testing.assert_array_equal(weights["layers.0.experts.down"], down)
    up = dequantise_mxfp4(arrays[f"{at}.gate_up_proj_blocks"], arrays[f"{at}.gate_up_proj_scales"])
    np.testing.assert_array_equal(weights["layers.0.experts.gate_up"][:, gated_rows(96, "up")], up[:, 1::2])


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("qwen3_moe-a3b", "model.layers.1.mlp.experts.7.up_proj.weight"),
        ("qwen2_moe-plain", "model.layers.0.mlp.shared_expert_gate.weight"),
        ("mixtral-eight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("gpt_oss-mxfp4", "model.layers.0.mlp.experts.down_proj_scales"),
        ("gpt_oss-small", "model.layers.2.self_attn.sinks"),
        ("gpt_oss-small", "model.layers.2.mlp.experts.gate_up_proj_bias"),
        ("glm4_moe-air", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gemma4_text-a4b", "model.layers.1.router.per_expert_scale"),
        ("llama4_text-scout", "model.layers.1.feed_forward.experts.down_proj"),
    ],
)
def test_45_a_missing_tensor_of_experts_is_named(name: str, lost: str) -> None:
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    del arrays[lost]
    assert f"{lost!r} missing" in refused(name, arrays)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen3_moe-a3b", "model.layers.1.mlp.experts.16.up_proj.weight"),  # an expert too many
        ("qwen3_moe-a3b", "model.layers.1.mlp.experts.gate_up_proj"),  # both layouts of one layer
        ("mixtral-eight", "model.layers.0.block_sparse_moe.experts.0.gate_proj.weight"),
        ("gpt_oss-small", "model.layers.0.mlp.experts.down_proj_blocks"),
        ("qwen3_moe-sparse", "model.layers.0.mlp.experts.0.up_proj.weight"),  # of a dense layer
        ("glm4_moe-air", "model.layers.0.mlp.gate.weight"),
        ("mixtral-eight", "model.layers.3.block_sparse_moe.gate.weight"),
    ],
)
def test_45_a_tensor_of_experts_too_many_is_named(name: str, extra: str) -> None:
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    arrays[extra] = np.zeros((4, 4), np.uint16)
    assert f"{extra!r} unexpected" in refused(name, arrays)


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "expected"),
    [
        ("qwen3_moe-a3b", "model.layers.0.mlp.experts.3.down_proj.weight", (64, 25), "[64, 24]"),
        ("gemma4_text-a4b", "model.layers.0.experts.gate_up_proj", (7, 80, 64), "[8, 80, 64]"),
        ("llama4_text-scout", "model.layers.0.feed_forward.experts.down_proj", (4, 41, 64), "[4, 40, 64]"),
        ("gpt_oss-small", "model.layers.0.mlp.experts.gate_up_proj_bias", (8, 143), "[8, 144]"),
        ("gpt_oss-mxfp4", "model.layers.0.mlp.experts.down_proj_scales", (8, 64, 2), "[8, 64, 3]"),
        ("mixtral-eight", "model.layers.0.block_sparse_moe.gate.weight", (9, 64), "[8, 64]"),
    ],
)
def test_45_a_misshapen_tensor_of_experts_is_named(
    name: str, tensor: str, shape: tuple[int, ...], expected: str
) -> None:
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    arrays[tensor] = np.zeros(shape, arrays[tensor].dtype)
    assert f"{tensor} is {list(shape)}, expected {expected}" in refused(name, arrays)


def test_a_config_that_names_another_format_is_refused() -> None:
    blocks = dict(tiny.tensors("gpt_oss-mxfp4", families.CASES["gpt_oss-mxfp4"]))
    config = dict(families.CASES["gpt_oss-mxfp4"].config)
    del config["quantization_config"]
    spec, weight_map = parse_config(config)
    with pytest.raises(WeightsError, match="holds MXFP4 blocks, but quantization_config names none"):
        load_weights(lower(spec, 48), Tensors(Memory(blocks), weight_map, 3), NoSink())


def test_layers_that_predict_further_tokens_are_ignored() -> None:
    """GLM-4.5 files hold one layer more than num_hidden_layers."""
    name = "glm4_moe-air"
    arrays = dict(tiny.tensors(name, families.CASES[name]))
    want = loaded(name, dict(arrays))
    for tensor, array in list(arrays.items()):
        if ".layers.2." in tensor:
            arrays[tensor.replace(".layers.2.", ".layers.3.")] = array
    assert "unexpected" in refused(name, dict(arrays))
    arrays["model.layers.3.eh_proj.weight"] = np.zeros((64, 128), np.uint16)
    arrays["model.layers.3.shared_head.norm.weight"] = np.zeros(64, np.uint16)
    assert_same(loaded(name, arrays), want)

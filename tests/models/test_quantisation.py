"""Quantised checkpoints as models: found by their tensors, checked against quantization_config, run like the dense one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from golden import tiny
from golden.harness import prefill
from quant import layouts

from pace.checkpoint import Checkpoint, model_files
from pace.engine.loader import read_config
from pace.errors import CheckpointError, PaceError, UnsupportedModel
from pace.models.decoder import lower
from pace.models.quantisation import quantisation
from pace.models.registry import parse_config
from pace.models.weights import DenseSink, Tensors, load_weights, settle_head
from pace.reference import Reference

CASE = "llama-mha"
FORMATS = ("compressed", "int8", "gptq", "awq", "fp8", "nvfp4")


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantise(format: str, n: int, k: int, seed: int, **options: Any) -> layouts.Quantised:
    makers: dict[str, Callable[..., layouts.Quantised]] = {
        "compressed": layouts.compressed,
        "int8": layouts.int8,
        "int8_groups": layouts.int8_groups,
        "gptq": layouts.gptq,
        "awq": layouts.awq,
        "fp8": lambda n, k, seed: layouts.fp8(n, k, seed=seed),
        "nvfp4": layouts.nvfp4,
    }
    return makers[format](n, k, seed=seed, **options)


def checkpoint(
    format: str, case: str = CASE, **options: Any
) -> tuple[dict[str, Any], dict[str, tuple[npt.NDArray[Any], str]], dict[str, npt.NDArray[Any]]]:
    """A model whose linear layers are quantised: config, tensors of the file, and the weights that those mean."""
    config = dict(tiny.CASES[case].config)
    tensors: dict[str, tuple[npt.NDArray[Any], str]] = {}
    meant: dict[str, npt.NDArray[Any]] = {}
    for seed, (name, bits) in enumerate(tiny.tensors(case).items()):
        if not linear(name):
            tensors[name] = bits, "BF16"
            continue
        n, k = bits.shape
        quantised = quantise(format, n, k, seed, **options)
        config["quantization_config"] = quantised.config
        meant[name] = quantised.weights.astype(np.float32)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{end}": value for end, value in quantised.tensors.items()}
    return config, tensors, meant


def dense(
    config: dict[str, Any], tensors: dict[str, Any]
) -> tuple[Any, dict[str, npt.NDArray[Any]], layouts.Memory]:
    spec, weight_map = parse_config(config)
    memory = layouts.Memory(tensors)
    opened = Tensors(memory, weight_map, len(spec.layers), quantisation(config))
    spec = settle_head(spec, opened)
    plan = lower(spec, tiny.N_TOKENS)
    sink = DenseSink()
    load_weights(plan, opened, sink)
    return plan, sink.weights, memory


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_model_is_the_dense_one_with_its_weights(format: str) -> None:
    """Fused q, k, v and gate, up keep each their own scales (vllm#38197); every tensor's pages are given back."""
    config, tensors, meant = checkpoint(format)
    plain = dict(config)
    del plain["quantization_config"]
    arrays = {
        name: value for name, value in tensors.items() if name in tiny.tensors(CASE) and name not in meant
    }
    arrays |= {name: (values, "F32") for name, values in meant.items()}
    _, expected, _ = dense(plain, arrays)
    plan, found, memory = dense(config, tensors)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert {name for name in memory.tensors if ".self_attn." in name} <= memory.dropped
    logits = prefill(Reference(plan, found, 16, 16), list(range(9)))
    assert np.isfinite(logits).all()


def test_heads_that_are_filled_keep_their_scales() -> None:
    """Columns of o_proj with zeros between heads: groups would move apart."""
    case = next(
        name for name in tiny.CASES if tiny.CASES[name].config.get("head_dim") not in (None, 16, 32, 64, 128)
    )
    config, tensors, _ = checkpoint("compressed", case, group=None)
    _, whole, _ = dense(config, tensors)
    config, tensors, _ = checkpoint("int8", case)
    _, found, _ = dense(config, tensors)
    assert all(np.isfinite(values).all() for values in [*whole.values(), *found.values()])


def test_names_with_what_tools_put_before_them() -> None:
    config, tensors, _ = checkpoint("gptq")
    _, expected, _ = dense(config, tensors)
    _, found, _ = dense(
        config, {f"model.language_model.{n.removeprefix('model.')}": v for n, v in tensors.items()}
    )
    assert all((found[name] == values).all() for name, values in expected.items())


def refused(config: dict[str, Any], tensors: dict[str, Any]) -> str:
    start = time.perf_counter()
    with pytest.raises(PaceError) as caught:
        dense(config, tensors)
    assert time.perf_counter() - start < 1
    return str(caught.value)


Q = "model.layers.1.self_attn.q_proj"


def test_a_module_that_the_config_ignores_but_the_file_has_quantised() -> None:
    config, tensors, _ = checkpoint("compressed")
    config["quantization_config"]["ignore"] = ["lm_head", Q]
    assert f"{Q} is quantised" in refused(config, tensors)
    config["quantization_config"]["ignore"] = ["re:.*q_proj"]
    assert "q_proj is quantised" in refused(config, tensors)


def test_a_plain_module_that_the_config_says_is_quantised() -> None:
    config, tensors, meant = checkpoint("compressed")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{Q}.")}
    tensors[f"{Q}.weight"] = meant[f"{Q}.weight"], "F32"
    assert f"{Q}.weight is not quantised" in refused(config, tensors)
    config["quantization_config"]["ignore"] = ["lm_head", Q]
    dense(config, tensors)


def test_mixed_precision_by_name_pattern_and_class() -> None:
    """Exact names come before patterns, and those before "Linear"; every group has a format of its own."""
    config, tensors, meant = checkpoint("compressed")
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["format"] = "mixed-precision"
    groups["group_0"]["format"] = "pack-quantized"
    for name, pattern, other in (
        ("group_1", "re:.*down_proj$", "int8"),
        ("group_2", Q, "fp8"),
    ):
        for weight in [
            w for w in meant if f"{Q}.weight" == w or (other == "int8" and w.endswith("down_proj.weight"))
        ]:
            n, k = meant[weight].shape
            module = weight.removesuffix(".weight")
            made = layouts.int8(n, k) if other == "int8" else layouts.fp8(n, k, "row")
            tensors = {t: v for t, v in tensors.items() if not t.startswith(f"{module}.")}
            tensors |= {f"{module}.{end}": value for end, value in made.tensors.items()}
            meant[weight] = made.weights.astype(np.float32)
        weights = {"num_bits": 8, "type": "int" if other == "int8" else "float", "strategy": "channel"}
        form = "int-quantized" if other == "int8" else "float-quantized"
        groups[name] = {"targets": [pattern], "weights": weights, "format": form}
    _, found, _ = dense(config, tensors)
    np.testing.assert_array_equal(found["layers.0.down"], meant["model.layers.0.mlp.down_proj.weight"])
    np.testing.assert_array_equal(found["layers.1.qkv"][: len(meant[f"{Q}.weight"])], meant[f"{Q}.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.k_scale",
        "self_attn.attn.v_scale",
        "self_attn.k_proj.k_scale",
        "self_attn.v_proj.output_scale",
    ],
)
def test_kv_scales_of_an_fp8_cache_change_nothing_and_are_named(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """vllm#54623, vllm#25047: an FP8 cache needs them; what it approximates is in pace's cache as it is."""
    config, tensors, _ = checkpoint("fp8")
    _, expected, _ = dense(config, tensors)
    tensors[f"model.layers.0.{name}"] = np.float32(0.5).reshape(1), "F32"
    with caplog.at_level("INFO", "pace"):
        _, found, _ = dense(config, tensors)
    assert all((found[weight] == values).all() for weight, values in expected.items())
    assert "1 scales of an FP8 KV cache are not used" in caplog.text
    tensors["model.layers.0.self_attn.k_proj.k_norm_scale"] = np.float32(0.5).reshape(1), "F32"
    assert "k_norm_scale' unexpected" in refused(config, tensors)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
        ("modelopt", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}),
        ("quark", {"kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}}}),
    ],
)
def test_configs_of_an_fp8_cache_are_read(method: str, own: dict[str, Any]) -> None:
    config, _, _ = checkpoint("compressed")
    if method == "quark":
        weight = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}
        own = own | {"global_quant_config": {"weight": weight}}
    quantisation({"quantization_config": config["quantization_config"] | own | {"quant_method": method}})


def test_unknown_tensors_of_a_quantised_module_are_refused() -> None:
    config, tensors, _ = checkpoint("compressed")
    tensors[f"{Q}.weight_global_scale"] = np.ones(1, np.float32), "F32"
    assert f"{Q}.weight_global_scale is unexpected" in refused(config, tensors)


def test_quantised_tensors_without_a_config_are_refused() -> None:
    config, tensors, _ = checkpoint("gptq")
    del config["quantization_config"]
    assert "quantised weights" in refused(config, tensors)


def test_a_quantised_head_beside_a_tied_config_is_used() -> None:
    """sglang#2935, sglang#35358: never a silent skip."""
    config, tensors, _ = checkpoint("int8")
    head = layouts.int8(tiny.VOCAB_SIZE, config["hidden_size"])
    tensors.pop("lm_head.weight", None)
    tensors |= {f"lm_head.{end}": value for end, value in head.tensors.items()}
    config["quantization_config"]["ignore"] = []
    for tied in (True, False):
        _, found, _ = dense({**config, "tie_word_embeddings": tied}, tensors)
        np.testing.assert_array_equal(found["lm_head"], head.weights.astype(np.float32))


def test_a_head_left_plain_by_gptq_is_read() -> None:
    """mistral.rs#2348."""
    config, tensors, _ = checkpoint("gptq")
    assert "lm_head.weight" in tensors
    dense(config, tensors)


def test_biases_of_zeros_that_old_tools_wrote_are_nothing() -> None:
    config, tensors, _ = checkpoint("gptq")
    n = tensors[f"{Q}.scales"][0].shape[1]
    tensors[f"{Q}.bias"] = np.zeros(n, np.float16), "F16"
    dense(config, tensors)
    tensors[f"{Q}.bias"] = np.ones(n, np.float16), "F16"
    assert f"{Q}.bias' unexpected" in refused(config, tensors)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bitsandbytes", "'bitsandbytes' is not read; dequantise it"),
        ("hqq", "--quantization"),
        ("torchao", "--quantization"),
        ("brand-new", "supported are compressed-tensors"),
    ],
)
def test_methods_that_are_not_read_are_refused_by_name(method: str, message: str) -> None:
    config = {**tiny.CASES[CASE].config, "quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedModel, match=message):
        parse_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}}},
            "is not read",
        ),
        ({"config_groups": {"a": ["Linear"]}}, "expected an object"),
        ({"format": "nvfp4-pack-quantized"}, "is not read"),
        ({"ignore": ["re:(a+)+$"]}, "repeats a group"),
        ({"ignore": ["re:("]}, "cannot be used"),
        ({"ignore": "lm_head"}, "expected a list of strings"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(change: dict[str, Any], message: str) -> None:
    config, _, _ = checkpoint("compressed")
    config["quantization_config"] |= change
    with pytest.raises(CheckpointError, match=message):
        parse_config(config)


def test_bits_that_the_tensors_contradict() -> None:
    config, tensors, _ = checkpoint("compressed")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    assert "expected" in refused(config, tensors)


@pytest.mark.parametrize(
    ("file", "own", "made"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ],
)
def test_a_config_in_a_file_of_its_own(tmp_path: Path, file: str, own: dict[str, Any], made: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CASES[CASE].config))
    (tmp_path / file).write_text(json.dumps(own))
    found = quantisation(read_config(model_files(tmp_path)))
    assert found is not None and found.method == made


def test_autoround_and_quark_are_the_layouts_that_they_name() -> None:
    config, tensors, meant = checkpoint("gptq")
    name = f"{Q}.weight"
    for packing, version in (("auto_round:auto_gptq", 1), ("auto_round", 2)):
        _, tensors, meant = checkpoint("gptq", version=version)
        own = {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 32,
            "sym": False,
            "packing_format": packing,
        }
        _, found, _ = dense({**config, "quantization_config": own}, tensors)
        np.testing.assert_array_equal(found["layers.1.qkv"][: len(meant[name])], meant[name])
    _, tensors, meant = checkpoint("int8")
    weight = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
    own = {"quant_method": "quark", "global_quant_config": {"weight": weight}, "exclude": ["lm_head"]}
    _, found, _ = dense({**config, "quantization_config": own}, tensors)
    np.testing.assert_array_equal(found["layers.1.qkv"][: len(meant[name])], meant[name])


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    _, tensors, _ = checkpoint("compressed")
    path = tmp_path / "model.safetensors"
    layouts.write_safetensors(path, tensors)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(tmp_path)

"""Quantised checkpoints in the engine: their own format in memory, and the weights that the file means."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ext.kit import OneTable, bf16
from golden import families, tiny
from golden.harness import bf16_tolerance, prefill, relative_error
from models.test_quantisation import CASE, checkpoint
from quant import layouts
from tiny_checkpoint import write_checkpoint

from pace import ops
from pace.checkpoint import Checkpoint
from pace.engine.packing import PackedSink
from pace.models.decoder import lower
from pace.models.formats import with_formats, with_orders
from pace.models.held import held_formats
from pace.models.plan import Plan
from pace.models.quantisation import quantisation
from pace.models.registry import parse_config
from pace.models.weights import DenseSink, Tensors, load_weights
from pace.reference import Reference

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "compressed-tensors in groups of 32": ("compressed", {}, "int4g32"),
    "compressed-tensors asymmetric": ("compressed", {"symmetric": False}, "int4g32"),
    "compressed-tensors of 8 bits": ("compressed", {"bits": 8}, "int8g32"),
    "compressed-tensors of 6 bits": ("compressed", {"bits": 6}, "int8g32"),
    "int8 a row": ("int8", {}, "int8"),
    "gptq": ("gptq", {}, "int4g32"),
    "awq": ("awq", {}, "int4g32"),
    "nvfp4": ("nvfp4", {}, "int8g16"),
    "fp8 in blocks": ("fp8", {}, "fp8g128"),
}


MATRICES = {f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")}


def lowered(config: dict[str, Any], tensors: dict[str, Any]) -> tuple[Plan, Tensors]:
    spec, weight_map = parse_config(config)
    opened = Tensors(layouts.Memory(tensors), weight_map, len(spec.layers), quantisation(config))
    return lower(spec, tiny.N_TOKENS), opened


@pytest.mark.parametrize("name", CASES)
def test_packed_is_what_the_file_means(name: str, team: ops.Team) -> None:
    """Bit for bit for scales of 16 bits, and for f32 scales of FP8 too, as one product is rounded once."""
    format, options, expected = CASES[name]
    config, tensors, _ = checkpoint(format, **options)
    plan, opened = lowered(config, tensors)
    formats = held_formats(plan, opened).formats
    # Rows of 128 columns are one group of 128.
    assert set(formats.values()) - {"fp8"} == {expected}
    assert set(formats) == MATRICES
    plan = with_formats(plan, formats)
    packed, dense = PackedSink(team), DenseSink()
    load_weights(plan, opened, packed)
    load_weights(plan, opened, dense)
    for weight in formats:
        matrix = packed.weights[weight]
        assert isinstance(matrix, ops.PackedMatrix) and matrix.format == formats[weight]
        np.testing.assert_array_equal(
            matrix.unpack(), dense.weights[weight].astype(np.float32), err_msg=weight
        )


ORDERED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq": ("gptq", {}, "int4g32"),
    "gptq symmetric": ("gptq", {"symmetric": True}, "int4g32"),
    "gptq v2 of 8 bits": ("gptq", {"bits": 8, "version": 2}, "int8g32"),
    "gptq in groups of 64": ("gptq", {"group": 64, "symmetric": True}, "int4g64"),
    "compressed-tensors": ("compressed", {}, "int4g32"),
    "compressed-tensors asymmetric": ("compressed", {"symmetric": False}, "int4g32"),
    "compressed-tensors of 6 bits": ("compressed", {"bits": 6}, "int8g32"),
    "compressed-tensors, int8": ("int8_groups", {}, "int8g32"),
}


@pytest.mark.parametrize("name", ORDERED)
def test_columns_in_any_order_keep_their_bits(
    name: str, team: ops.Team, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights bit for bit, by group; in as many bytes as columns side by side take; the logits of float64 (see
    tests/models/test_executor.py for the limit), on bf16 rows, which meet exact weights."""
    format, options, expected = ORDERED[name]
    config, tensors, _ = checkpoint(format, order=3, **options)
    plain, opened = lowered(config, tensors)
    held = held_formats(plain, opened)
    assert set(held.formats) == MATRICES and set(held.formats.values()) == {expected}
    assert held.by_group == MATRICES
    assert "become bf16" not in caplog.text
    plan = with_formats(with_orders(plain, held.by_group), held.formats)
    plan.check()
    packed, dense, sorted_ = PackedSink(team), DenseSink(), DenseSink()
    load_weights(plan, opened, packed)
    load_weights(plan, opened, sorted_)
    load_weights(plain, opened, dense)
    usual = checkpoint(format, **options)
    usual_plan, usual_tensors = lowered(*usual[:2])
    side_by_side = PackedSink(team)
    load_weights(
        with_formats(usual_plan, held_formats(usual_plan, usual_tensors).formats), usual_tensors, side_by_side
    )
    for weight in MATRICES:
        matrix, order = packed.weights[weight], packed.weights[f"{weight}.order"]
        assert isinstance(matrix, ops.PackedMatrix) and isinstance(order, np.ndarray)
        at = order.astype(int)
        meant = dense.weights[weight][:, at].astype(np.float32)
        np.testing.assert_array_equal(matrix.unpack(), meant, err_msg=weight)
        np.testing.assert_array_equal(sorted_.weights[weight].astype(np.float32), meant, err_msg=weight)
        usual_matrix = side_by_side.weights[weight]
        assert isinstance(usual_matrix, ops.PackedMatrix) and matrix.nbytes == usual_matrix.nbytes
    tokens = tiny.prompt(CASE)
    truth = prefill(Reference(plain, dense.weights, 16, 16), tokens)
    assert relative_error(prefill(Reference(plan, sorted_.weights, 16, 16), tokens), truth) < 1e-12
    pools = [ops.KVPool(len(g.layers), g.layer.n_kv_heads, g.layer.head_dim, 16, 16) for g in plan.groups()]
    got = prefill(OneTable(team, plan, packed.weights, pools, 64, 1, 64), tokens)
    assert relative_error(got, truth) < bf16_tolerance(2)


def test_parts_in_different_orders_become_bf16(caplog: pytest.LogCaptureFixture, team: ops.Team) -> None:
    """One product has one order of columns; those that stand alone keep their bits. Values are the file's all the same."""
    config, tensors, _ = checkpoint("gptq", order=3)
    for name, own in checkpoint("gptq", order=4)[1].items():
        if ".k_proj." in name or ".up_proj." in name:
            tensors[name] = own
    plan, opened = lowered(config, tensors)
    held = held_formats(plan, opened)
    alone = {name for name in MATRICES if name.endswith((".o", ".down"))}
    assert set(held.formats) == alone and held.by_group == alone
    assert "4 matrices, the first of them layers.0.qkv, become bf16" in caplog.text
    packed, dense = PackedSink(team), DenseSink()
    load_weights(with_formats(with_orders(plan, alone), held.formats), opened, packed)
    load_weights(plan, opened, dense)
    qkv = packed.weights["layers.0.qkv"]
    assert isinstance(qkv, ops.PackedMatrix)
    np.testing.assert_array_equal(qkv.unpack(), bf16(dense.weights["layers.0.qkv"]))


def test_groups_of_several_sizes_become_bf16(caplog: pytest.LogCaptureFixture) -> None:
    config, tensors, _ = checkpoint("gptq", order=3)
    for name, (array, dtype) in tensors.items():
        if name.endswith(".g_idx"):
            changed = array.copy()
            changed[np.flatnonzero(changed == 0)[0]] = 1
            tensors[name] = changed, dtype
    plan, opened = lowered(config, tensors)
    held = held_formats(plan, opened)
    assert held.formats == {} and held.by_group == frozenset() and held.rounded == MATRICES
    assert "8 matrices, the first of them layers.0.qkv, become bf16" in caplog.text


def test_experts_in_any_order_become_bf16(caplog: pytest.LogCaptureFixture, team: ops.Team) -> None:
    """They would need an order each; the attention beside them keeps its bits, and all values are the file's."""
    name = "mixtral-eight"
    config, tensors = dict(families.CASES[name].config), dict[str, Any]()
    experts = dict[str, Any]()
    for seed, (tensor, bits) in enumerate(tiny.tensors(name, families.CASES[name]).items()):
        if not re.search(r"_proj|experts", tensor):
            tensors[tensor] = bits, "BF16"
            continue
        made = layouts.compressed(*bits.shape, order=bits.shape[1], seed=seed)
        config["quantization_config"] = made.config
        tensors |= {tensor.removesuffix("weight") + end: value for end, value in made.tensors.items()}
        experts[tensor] = made.weights
    plan, opened = lowered(config, tensors)
    held = held_formats(plan, opened)
    assert (
        held.by_group
        == set(held.formats)
        == {f"layers.{i}.{part}" for i in range(3) for part in ("qkv", "o")}
    )
    assert "6 matrices, the first of them layers.0.experts.gate_up, become bf16" in caplog.text
    packed = PackedSink(team)
    load_weights(with_formats(with_orders(plan, held.by_group), held.formats), opened, packed)
    down = packed.weights["layers.1.experts.down"]
    assert isinstance(down, ops.PackedMatrix)
    for e in range(8):
        weights = experts[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"]
        np.testing.assert_array_equal(down.unpack(e)[:, : weights.shape[1]], bf16(weights))


def test_what_fills_heads_and_rows_stands_behind_all_groups(tmp_path: Path, team: ops.Team) -> None:
    """4 heads of 24 columns, filled to 32 each, and 136 inner columns, filled to 144, of which the last group has 8."""
    folder = write_checkpoint(tmp_path / "model", head_dim=24, intermediate_size=136)
    meant = layouts.quantise_folder(folder, lambda n, k, seed: layouts.compressed(n, k, order=k, seed=seed))
    config = json.loads((folder / "config.json").read_text())
    spec, weight_map = parse_config(config)
    with Checkpoint(folder) as file:
        opened = Tensors(file, weight_map, len(spec.layers), quantisation(config))
        plain = lower(spec, 64)
        held = held_formats(plain, opened)
        assert set(held.formats.values()) == {"int4g32"} and held.by_group == MATRICES
        plan = with_formats(with_orders(plain, held.by_group), held.formats)
        packed = PackedSink(team)
        load_weights(plan, opened, packed)
    for part, width, filled in (("self_attn.o", 24, 32), ("mlp.down", 136, 144)):
        name = f"layers.1.{part.partition('.')[2]}"
        matrix, order = packed.weights[name], packed.weights[f"{name}.order"]
        weights = meant[f"model.layers.1.{part}_proj.weight"]
        k = weights.shape[1]
        assert isinstance(matrix, ops.PackedMatrix) and isinstance(order, np.ndarray)
        assert sorted(order) == list(range(matrix.k)) and matrix.k == k // width * filled
        at = order[:k].astype(int)  # behind them stand inputs of 0
        assert (at % filled < width).all()
        np.testing.assert_array_equal(matrix.unpack()[:, :k], weights[:, at // filled * width + at % filled])

"""Errors that other engines' kernels for quantised weights made, each with the numbers that show it.

Saturation in 16 bits (onnxruntime#6004, oneDNN#717, BitNet#629) and -128 (ggml#1393) are in
`test_group_formats.test_the_largest_integers_do_not_saturate`; those of readers in `tests/quant` and `tests/models`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import U_F32, assert_close, bf16, build, chosen, packed, poison, put, rows_batch, take
from ext.test_group_formats import FORMATS, Rows, dense, matrix_of, random_rows
from ext.test_mxfp4 import int8_plan

from pace import ops
from pace.engine.guard import MAX_ERROR, choose_activations, measure
from pace.models import plan as ir
from pace.models.weight_formats import group_of, int8_group


def by_bf16_rows(team: ops.Team, kernel: str, matrix: ops.PackedMatrix) -> ops.Plan:
    slots = [ir.Slot("a", matrix.k, "bf16", "tokens"), ir.Slot("c", matrix.n, "f32", "tokens")]
    return build(team, [ir.Gemm("g", "a", "c", "w")], slots, {"w": matrix}, kernels=chosen(kernel))


def products(team: ops.Team, kernel: str, matrix: ops.PackedMatrix, x: Any) -> list[Any]:
    """By bf16 rows, and by int8 rows where the format has them; what the slots held before was no number."""
    group = int8_group(matrix.format)
    plans = [by_bf16_rows(team, kernel, matrix)]
    plans += [] if group is None else [int8_plan(team, kernel, matrix, group)]
    results = []
    for plan in plans:
        poison(plan, "a", "c")
        put(plan, "a", x)
        plan.step(rows_batch(len(x)))
        results.append(take(plan, "c", len(x)))
    return results


@pytest.mark.parametrize("format", ["int8g32", "int4g32", "int4g128", "int8"])
def test_sums_of_large_rows_stay_finite(kernel: str, team: ops.Team, format: str) -> None:
    """ik_llama.cpp#540: 32 x 4096 times a scale, kept in 16 bits, was infinite."""
    rows = random_rows(format, 17, 128, "zeros")
    x = np.full((2, 128), 4096.0)
    size = np.abs(x) @ (rows.codes.max() * np.repeat(rows.scales, rows.group, 1)[:, :128]).T
    for got in products(team, kernel, matrix_of(team, format, rows), x):
        assert_close(got, x @ dense(format, rows).T, 300 * U_F32 * size)


def test_a_column_that_rounds_the_others_to_0_keeps_bf16_rows(team: ops.Team) -> None:
    """onnxruntime#29849: x = [1000, 1 x 31] by w = [0, 1 x 31] is 31, by int8 rows 0; the guard sees it."""
    codes = np.full((16, 32), 129, np.uint8)
    codes[:, 0] = 128
    matrix = matrix_of(team, "int8g32", Rows(codes, 8, 32, np.ones((16, 1), np.float32)))
    x = np.array([[1000.0] + [1.0] * 31])
    exact, rounded = products(team, "auto", matrix, x)
    assert (exact == 31).all() and (rounded == 0).all()
    slots = [ir.Slot("a", 32, "bf16", "tokens"), ir.Slot("r", 32, "bf16", "logits")]
    slots.append(ir.Slot("logits", 16, "f32", "logits"))
    operators = (
        ir.Embed("embed", "a", "table"),
        ir.Select("select", "a", "r"),
        ir.Gemm("head", "r", "logits", "w", format="int8g32"),
    )
    plan = ir.Plan({slot.name: slot for slot in slots}, operators, (), (), 16, 32, "logits")
    weights = {"table": packed(team, np.repeat(x, 16, 0)), "w": matrix}
    measured = measure(plan, weights, team, None)
    assert measured is not None and measured.errors["w"] > MAX_ERROR
    assert choose_activations(measured) == {"w": "bf16"}


@pytest.mark.parametrize("format", ["int4g32", "int8g32", "int4g64", "int4g128"])
def test_each_group_has_its_own_scale(kernel: str, team: ops.Team, format: str) -> None:
    """aprender#3105: groups of q = 1, scale 1 and q = 0, scale 2; x = 1 gives 32, or 48 by scales of mixed halves."""
    group = group_of(format)
    codes = np.zeros((3, 2 * group), np.uint8)
    codes[:, :group] = 1
    scales = np.tile(np.array([1, 2], np.float32), (3, 1))
    matrix = matrix_of(team, format, Rows(codes, int(format[3]), group, scales, np.zeros_like(scales)))
    for got in products(team, kernel, matrix, np.ones((2, 2 * group))):
        assert (got == group).all()


@pytest.mark.parametrize("format", ["int4g32", "int8g64", "fp8g128", "int8"])
def test_packed_experts_of_any_number_of_rows_are_the_plain_ones(team: ops.Team, format: str) -> None:
    """llama.cpp#12528, #12657: repacked rows of experts were nonsense where rows are no multiple of 8."""
    for n in (*range(1, 18), 31, 33, 40):
        own = [random_rows(format, n, 96, scales=kind) for kind in ("f16", "f32")]
        matrix = ops.PackedMatrix(team, n, 96, count=2, format=format)
        pack = matrix.pack_fp8 if format.startswith("fp8") else matrix.pack_groups
        for expert, rows in enumerate(own):
            pack(rows, matrix=expert)
        for expert, rows in enumerate(own):
            assert np.array_equal(matrix.unpack(expert), dense(format, rows).astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_columns_that_no_256_divides(kernel: str, team: ops.Team, format: str) -> None:
    """ik_llama.cpp#2141: NaN for such columns in a path of 512 bits; the slots' padding holds NaN here."""
    for k in (32, 96, 128, 288, 2880):
        rows = random_rows(format, 18, k, scales="f32")
        x = bf16(np.random.default_rng(k).standard_normal((3, k)))
        want = x @ dense(format, rows).T
        exact, *rounded = products(team, kernel, matrix_of(team, format, rows), x)
        assert_close(exact, want, (k + 40) * U_F32 * (np.abs(x) @ np.abs(dense(format, rows)).T))
        # Half a step of 127 in every column.
        step = np.abs(x).max(-1, keepdims=True) / 254 * 1.001
        for got in rounded:
            assert_close(got, want, step * np.abs(dense(format, rows)).sum(-1))


@pytest.mark.parametrize("format", ["bf16", *FORMATS])
def test_sources_at_any_address(team: ops.Team, format: str) -> None:
    """llama.cpp#16479: a file maps tensors wherever its header ends, 1 byte behind a cache line among others."""

    def moved(array: Any) -> Any:
        raw = np.empty(array.nbytes + 128, np.uint8)
        at = -raw.ctypes.data % 64 + 1
        raw[at : at + array.nbytes] = array.view(np.uint8).reshape(-1)
        found = raw[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        assert found.ctypes.data % 64 == 1
        return found

    n, k = 37, 160
    if format == "bf16":
        for dtype, numpy in (("bf16", np.uint16), ("f16", np.float16), ("f32", np.float32)):
            values = np.random.default_rng(0).integers(0, 1 << 14, (n, k)).astype(numpy)
            matrices = [ops.PackedMatrix(team, n, k) for _ in range(2)]
            for matrix, source in zip(matrices, (values, moved(values)), strict=True):
                matrix.pack(source, dtype)
            assert matrices[0].unpack().tobytes() == matrices[1].unpack().tobytes()
        return
    rows = random_rows(format, n, k)
    other = Rows(moved(rows.codes), rows.bits, rows.group, moved(rows.scales))
    assert (
        matrix_of(team, format, other).unpack().tobytes() == dense(format, rows).astype(np.float32).tobytes()
    )

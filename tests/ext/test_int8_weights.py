"""Weights of int8 with a scale per column, on every tier, by bf16 rows and by int8 rows.

Tolerances. bf16 rows: products of a bf16 number and an integer are exact in float64, their sum in f32 is off by
(k + 2) u S as in test_gemm, and the column's scale rounds once more. int8 rows: a group's sum of integers is exact, below
2^24; k / 32 fmas and the product with the scale: (k / 32 + 1) u S.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import (
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    memory,
    poison,
    put,
    rng,
    rows_batch,
    take,
)
from ext.test_mxfp4 import FEW_ROWS, MANY_ROWS, int8_plan, quantised

from pace import ops
from pace.errors import CheckpointError
from pace.models import plan as ir


def random_int8(n: int, k: int) -> tuple[Any, Any]:
    """Codes [n, k], -128 included, and scales [n]."""
    r = rng("int8", n, k)
    return r.integers(-128, 128, (n, k), np.int8), r.uniform(0.001, 0.02, n).astype(np.float32)


def packed_int8(team: ops.Team, codes: Any, scales: Any) -> ops.PackedMatrix:
    matrix = ops.PackedMatrix(team, *codes.shape, format="int8")
    matrix.pack_int8(codes, scales)
    return matrix


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (40, 100), (64, 256)])
def test_packing_is_exact(isa: str, team: ops.Team, n: int, k: int) -> None:
    codes, scales = random_int8(n, k)
    with ops.using_isa(isa):
        got = packed_int8(team, codes, scales).unpack()
    assert got.tobytes() == (codes.astype(np.float32) * scales[:, None]).tobytes()


def test_gate_up_and_experts(team: ops.Team) -> None:
    """Parts of a gated matrix, of one of several."""
    codes, scales = random_int8(2 * 40, 70)
    matrix = ops.PackedMatrix(team, 2 * 48, 70, count=2, format="int8")
    for part, name in enumerate(("gate", "up")):
        rows = slice(40 * part, 40 * part + 40)
        matrix.pack_int8(codes[rows], scales[rows], mode=name, matrix=1)
    want = codes.astype(np.float32) * scales[:, None]
    halves = matrix.unpack(1).reshape(3, 2, 16, 70)
    for part in range(2):
        rows = halves[:, part].reshape(48, 70)
        assert np.array_equal(rows[:40], want[40 * part : 40 * part + 40]) and not rows[40:].any()
    assert not matrix.unpack(0).any()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers(team: ops.Team, scale: float) -> None:
    codes, scales = random_int8(40, 64)
    scales[33] = scale
    with pytest.raises(CheckpointError, match="row 33 has a scale that is no finite number"):
        packed_int8(team, codes, scales)


def test_what_does_not_fit(team: ops.Team) -> None:
    codes, scales = random_int8(8, 64)
    matrix = packed_int8(team, codes, scales)
    with pytest.raises(ValueError, match="8 rows of 64 integers with 7 scales"):
        matrix.pack_int8(codes, scales[:7])
    with pytest.raises(ValueError, match="codes are uint8"):
        matrix.pack_int8(codes.view(np.uint8), scales)
    with pytest.raises(ValueError, match="for a quantised matrix"):
        matrix.pack(codes.astype(np.float32), "f32")
    with pytest.raises(ValueError, match="for a matrix of another format"):
        ops.PackedMatrix(team, 8, 64).pack_int8(codes, scales)


@pytest.mark.parametrize("k", [1, 31, 32, 100, 544])
@pytest.mark.parametrize("n", [1, 17, 33, 307])
def test_products_of_bf16_rows(kernel: str, team: ops.Team, n: int, k: int) -> None:
    """Close to float64 at every m, and each row the same bytes at every m."""
    codes, scales = random_int8(n, k)
    slots = [ir.Slot("a", k, "bf16", "tokens"), ir.Slot("c", n, "f32", "tokens")]
    weights = {"w": packed_int8(team, codes, scales)}
    plan = build(team, [ir.Gemm("g", "a", "c", "w")], slots, weights, kernels=chosen(kernel))
    x = rng("rows", k).standard_normal((300, k))
    w = codes * scales.astype(np.float64)[:, None]
    check(plan, kernel, x, lambda m: bf16(x[:m]), w, k + 3)


@pytest.mark.parametrize("k", [32, 96, 544])
@pytest.mark.parametrize("n", [1, 17, 33, 307])
def test_products_of_int8_rows(kernel: str, team: ops.Team, n: int, k: int) -> None:
    """The same, the largest integers of one sign among them."""
    codes, scales = random_int8(n, k)
    codes[0] = -128
    plan = int8_plan(team, kernel, packed_int8(team, codes, scales))
    x = rng("rows", k).standard_normal((300, k)) * 4
    x[1] = 100

    def rows(m: int) -> Any:
        q, scale, _ = quantised(memory(plan, "q")[:m], k)
        return q * scale.astype(np.float64).repeat(32, 1)

    check(plan, kernel, x, rows, codes * scales.astype(np.float64)[:, None], k // 32 + 2)


def check(plan: ops.Plan, kernel: str, x: Any, rows: Any, w: Any, units: int) -> None:
    """`rows(m)`: what the kernels multiply."""
    whole = b""
    for m in sorted(FEW_ROWS if kernel == "reference" else MANY_ROWS, reverse=True):
        put(plan, "a", x[:m])
        poison(plan, "c")
        plan.step(rows_batch(m))
        got = take(plan, "c", m)
        if not whole:
            a = rows(m)
            assert_close(got, a @ w.T, units * U_F32 * (np.abs(a) @ np.abs(w).T))
            whole = got.tobytes()
        assert got.tobytes() == whole[: got.nbytes], f"{m} rows differ"

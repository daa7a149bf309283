"""The GEMM: every tier, odd shapes, epilogues and activations, against float64.

Tolerance. Inputs are bf16, so the products are exact in float64. A sum of k products in f32 is off by at
most (k + 2) u S, with u = 2^-24 and S = sum |a| |w| + |bias|. An activation stretches that by its
steepest slope (1.13 for the gelus, 1.1 for silu) and adds its own approximation, 2^-21 |y| (simd.h: erf
within 2e-7, exp within a few units). Storing costs 2^-24 relative for f32 and 2^-8 for bf16.
"""

from __future__ import annotations

import numpy as np
import pytest
from ext.kit import (
    F64,
    U_BF16,
    U_F32,
    assert_close,
    bf16,
    build,
    chosen,
    memory,
    packed,
    poison,
    put,
    rng,
    rows_batch,
    take,
)

from pace import ops
from pace.models import plan as ir
from pace.reference import activate, split_gated

SLOPE = 1.13
ACT_ERROR = 2.0**-21

MANY_ROWS = (*range(1, 41), 65, 300)  # 300: the blocked path, several tiles of rows
FEW_ROWS = (1, 2, 13, 33)  # what the scalar C kernel gets


def rows_for(kernel: str) -> tuple[int, ...]:
    return FEW_ROWS if kernel == "reference" else MANY_ROWS


def gemm_plan(
    team: ops.Team, kernel: str, op: ir.Gemm, k: int, width: int, dtype: ir.Dtype, weights: dict[str, object]
) -> ops.Plan:
    slots = [ir.Slot("a", k, "bf16", "tokens"), ir.Slot("c", width, dtype, "tokens")]
    return build(team, [op], slots, weights, kernels=chosen(kernel))


@pytest.mark.parametrize("k", [16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("n", [1, 16, 17, 31, 32, 33, 307])
def test_shapes(kernel: str, team: ops.Team, n: int, k: int) -> None:
    check_shape(kernel, team, n, k, rows_for(kernel))


@pytest.mark.parametrize(("n", "k"), [(33, 2080), (1600, 48)])
def test_large_shapes(kernel: str, team: ops.Team, n: int, k: int) -> None:
    """Longer than one chunk of k, and enough panels for whole groups per worker."""
    check_shape(
        kernel, team, n, k, (3,) if kernel == "reference" else (1, 2, 5, 13, 14, 15, 32, 33, 64, 65, 300)
    )


def check_shape(kernel: str, team: ops.Team, n: int, k: int, rows: tuple[int, ...]) -> None:
    """Close to float64 at every m, and each row the same bytes at every m."""
    r = rng("gemm", n, k)
    w, x = r.standard_normal((n, k)), r.standard_normal((max(rows), k))
    matrix = packed(team, w)
    plan = gemm_plan(team, kernel, ir.Gemm("g", "a", "c", "w"), k, n, "f32", {"w": matrix})
    a, wd = bf16(x), matrix.unpack().astype(np.float64)
    want, size = a @ wd.T, np.abs(a) @ np.abs(wd).T
    tolerance = (k + 2) * U_F32 * size + U_F32 * np.abs(want)
    whole: F64 | None = None
    for m in sorted(rows, reverse=True):
        put(plan, "a", x[:m])
        poison(plan, "c")
        plan.step(rows_batch(m))
        got = take(plan, "c", m)
        if whole is None:
            assert_close(got, want, tolerance)
            whole = got
        assert got.tobytes() == whole[:m].tobytes(), f"{m} rows differ from {len(whole)}"


EPILOGUES: list[tuple[ir.Epilogue, ir.Activation | None, float, ir.Dtype, bool]] = [
    ("store", None, 1.0, "bf16", True),
    ("store", "silu", 1.0, "bf16", True),
    ("store", "gelu", 1.0, "f32", True),
    ("store", "gelu_tanh", 0.5, "f32", False),
    ("store", "relu", -2.0, "bf16", False),
    ("add", None, 1.0, "f32", True),
    ("add", None, 0.25, "f32", False),
]


@pytest.mark.parametrize(("epilogue", "act", "scale", "dtype", "bias"), EPILOGUES)
@pytest.mark.parametrize(("n", "k"), [(17, 31), (33, 64), (96, 100)])
def test_epilogues(
    kernel: str,
    team: ops.Team,
    n: int,
    k: int,
    epilogue: ir.Epilogue,
    act: ir.Activation | None,
    scale: float,
    dtype: ir.Dtype,
    bias: bool,
) -> None:
    r = rng("epilogue", n, k)
    matrix = packed(team, r.standard_normal((n, k)))
    b = r.standard_normal(n).astype(np.float32)
    op = ir.Gemm("g", "a", "c", "w", "b" if bias else None, epilogue, act, scale)
    plan = gemm_plan(team, kernel, op, k, n, dtype, {"w": matrix, "b": b})
    wd = matrix.unpack().astype(np.float64)
    for m in (1, 7, 14, 33, 70):
        a = put(plan, "a", r.standard_normal((m, k)))
        poison(plan, "c")
        before = np.zeros((m, n))
        if epilogue == "add":
            memory(plan, "c")[:m, :n] = before = r.standard_normal((m, n)).astype(np.float32)
        plan.step(rows_batch(m))
        y = a @ wd.T + bias * b.astype(np.float64)
        size = np.abs(a) @ np.abs(wd).T + bias * np.abs(b)
        want = before + scale * activate(y, act)
        tolerance = abs(scale) * (SLOPE * (k + 2) * U_F32 * size + ACT_ERROR * np.abs(y) * (act is not None))
        tolerance += (U_BF16 if dtype == "bf16" else 2 * U_F32) * (np.abs(want) + np.abs(before))
        assert_close(take(plan, "c", m), want, tolerance)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", None])
@pytest.mark.parametrize(("inner", "k", "bias"), [(16, 33, True), (48, 64, False), (208, 128, True)])
def test_gated(
    kernel: str, team: ops.Team, inner: int, k: int, bias: bool, act: ir.Activation | None
) -> None:
    """act(gate) * up from one panel; the two halves are packed apart, as a checkpoint has them."""
    r = rng("gated", inner, k)
    gate, up = (r.standard_normal((inner, k)).astype(np.float32) for _ in range(2))
    matrix = ops.PackedMatrix(team, 2 * inner, k)
    matrix.pack(gate, "f32", mode="gate")
    matrix.pack(up, "f32", mode="up")
    b = r.standard_normal(2 * inner).astype(np.float32)
    op = ir.Gemm("g", "a", "c", "w", "b" if bias else None, "gated", act)
    plan = gemm_plan(team, kernel, op, k, inner, "bf16", {"w": matrix, "b": b})
    wd = matrix.unpack().astype(np.float64)
    for m in (1, 2, 13, 33, 65):
        a = put(plan, "a", 2 * r.standard_normal((m, k)))
        poison(plan, "c")
        plan.step(rows_batch(m))
        g, u = split_gated(a @ wd.T + bias * b.astype(np.float64))
        g_size, u_size = split_gated(np.abs(a) @ np.abs(wd).T + bias * np.abs(b))
        acted = activate(g, act)
        want = acted * u
        unit = (k + 2) * U_F32
        g_error, u_error = SLOPE * unit * g_size + ACT_ERROR * np.abs(g), unit * u_size
        tolerance = g_error * (np.abs(u) + u_error) + np.abs(acted) * u_error + U_BF16 * np.abs(want)
        assert_close(take(plan, "c", m), want, tolerance * (1 + U_BF16))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation_over_its_range(kernel: str, team: ops.Team, act: ir.Activation) -> None:
    """k = 1 and weight 1 make the sum exact: every bf16 number from 2^-20 to 128, both signs, and 0."""
    bits = np.arange(0x3580, 0x4300, dtype=np.uint16)
    values = np.concatenate([bits, bits | 0x8000, [0, 0x8000]]).astype(np.uint16)
    rows, n = 317, len(values)
    values = np.resize(values, (-(-n // rows), rows))
    plan = gemm_plan(
        team, kernel, ir.Gemm("g", "a", "c", "w", act=act), 1, 1, "f32", {"w": packed(team, np.ones((1, 1)))}
    )
    for chunk in values:
        x = put(plan, "a", (chunk.astype(np.uint32) << 16).view(np.float32)[:, None])
        poison(plan, "c")
        plan.step(rows_batch(rows))
        want = activate(x, act)
        assert_close(take(plan, "c", rows), want, ACT_ERROR * np.abs(x))


def test_inputs_keep_their_nan(kernel: str, team: ops.Team) -> None:
    """A NaN row stays a NaN row and touches no other."""
    r = rng("nan")
    matrix = packed(team, r.standard_normal((40, 64)))
    plan = gemm_plan(team, kernel, ir.Gemm("g", "a", "c", "w"), 64, 40, "f32", {"w": matrix})
    x = r.standard_normal((9, 64))
    put(plan, "a", x)
    poison(plan, "c")
    plan.step(rows_batch(9))
    clean = take(plan, "c", 9)
    x[4, 7] = np.nan
    put(plan, "a", x)
    poison(plan, "c")
    plan.step(rows_batch(9))
    got = take(plan, "c", 9)
    assert np.isnan(got[4]).all()
    assert np.delete(got, 4, 0).tobytes() == np.delete(clean, 4, 0).tobytes()

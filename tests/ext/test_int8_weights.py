"""Weights of int8 with a scale per column, on every tier, by int8 rows (by bf16 rows: test_group_formats).

Tolerance: a group's sum of integers is exact, below 2^24; k / 32 fmas and the product with the scale: (2 k / 32 + 4) u S.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import U_F32, assert_close, memory, poison, put, rng, rows_batch, take
from ext.test_group_formats import Rows, matrix_of
from ext.test_mxfp4 import FEW_ROWS, MANY_ROWS, int8_plan, quantised

from pace import ops


def random_int8(n: int, k: int) -> tuple[Any, Any]:
    """Codes [n, k], -128 included, and scales [n]."""
    r = rng("int8", n, k)
    return r.integers(-128, 128, (n, k), np.int8), r.uniform(0.001, 0.02, n).astype(np.float32)


def packed_int8(team: ops.Team, codes: Any, scales: Any) -> ops.PackedMatrix:
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
    return matrix_of(team, "int8", Rows(unsigned, 8, codes.shape[1], scales[:, None]))


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

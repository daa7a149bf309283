"""The two forms of quantised rows: what their codes, scales and offsets mean."""

from __future__ import annotations

import numpy as np
import pytest

from pace.quant.groups import E4M3, Fp8Rows, GroupedRows


def test_e4m3_has_the_values_of_its_bits() -> None:
    """Recomputed bit by bit: a sign, four bits of exponent with bias 7, three of mantissa, no infinities."""
    for code, value in enumerate(E4M3):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        if code & 0x7F == 0x7F:
            assert np.isnan(value)
            continue
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        assert value == (-size if sign else size)
    assert np.signbit(E4M3[0x80]) and np.nanmax(E4M3) == 448


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (40, 32), (64, 64), (48, 48)])
def test_codes_times_scales_plus_offsets(bits: int, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    n_groups = -(-k // group)
    codes = rng.integers(0, 1 << bits, (3, k), np.uint8)
    scales = rng.normal(size=(3, n_groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, (3, n_groups)).astype(np.float32)
    plain = GroupedRows(codes, bits, group, scales).dequantised()
    shifted = GroupedRows(codes, bits, group, scales, -zeros * scales).dequantised()
    for r in range(3):
        for c in range(k):
            scale, zero = float(scales[r, c // group]), float(zeros[r, c // group])
            assert plain[r, c] == (int(codes[r, c]) - (1 << (bits - 1))) * scale
            assert shifted[r, c] == (int(codes[r, c]) - zero) * scale


def test_full_range_codes_have_minus_128() -> None:
    """ggml#1393: -128 exists, and its product with -1 is 128."""
    rows = GroupedRows(np.array([[0, 255]], np.uint8), 8, 2, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(rows.dequantised(), [[-128, 127]])


def test_fp8_blocks_are_of_128_columns() -> None:
    codes = np.full((1, 300), 0x38, np.uint8)  # 1.0
    rows = Fp8Rows(codes, 128, np.array([[2, 3, 5]], np.float32))
    values = rows.dequantised()[0]
    assert [values[0], values[127], values[128], values[255], values[256], values[299]] == [2, 2, 3, 3, 5, 5]

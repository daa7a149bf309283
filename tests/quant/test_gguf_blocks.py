"""GGUF's blocks against the `gguf` package, bit for bit."""

from __future__ import annotations

import gguf_kit
import numpy as np
import pytest

from pace.quant.gguf_blocks import BLOCKS, grouped


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_mean_what_the_gguf_package_says(kind: str) -> None:
    rows = gguf_kit.random_rows(kind, 24, 5)
    read = grouped(kind, rows)
    want = gguf_kit.gguf.quants.dequantize(rows, gguf_kit.gguf.GGMLQuantizationType[kind])
    got = read.dequantised()
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    assert read.codes.max() < 1 << read.bits
    assert read.scales.shape == (24, -(-got.shape[1] // read.group))


def test_a_block_of_known_values() -> None:
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([0.5], np.float16).view(np.uint8)
    block[0, 2] = 0x21
    values = grouped("Q4_0", block).dequantised()[0]
    assert values[0] == (1 - 8) * 0.5
    assert values[16] == (2 - 8) * 0.5

"""Rows of quantised matrices, in the two forms that every format is read into: small integers, and FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["E4M3", "F32Array", "Fp8Rows", "GroupedRows", "U8Array"]

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]


def _e4m3() -> F32Array:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    values[127] = np.nan  # of all ones; there are no infinities
    return np.concatenate([values, -values]).astype(np.float32)


E4M3: Final = _e4m3()
"""f32 [256]: the values of FP8 E4M3's codes; 0x7f and 0xff are NaN, the largest is 448."""


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Rows of a matrix as small integers: weight[r, c] = codes[r, c] * scales[r, c // group] + offsets[r, c // group].

    Args:
        codes: uint8 [rows, k], below 2^bits.
        bits: 4 or 8; codes of 5 and 6 bits come as 8.
        group: columns that share a scale: 16 (Q6_K only), 32, 64, 128, or k (a scale per row).
        scales: f32 [rows, ceil(k / group)].
        offsets: f32 [rows, ceil(k / group)], -zero * scale; None: symmetric, -2^(bits - 1) * scale.
    """

    codes: U8Array
    bits: int
    group: int
    scales: F32Array
    offsets: F32Array | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def dequantised(self) -> F32Array:
        """The weights, f32 [rows, k]: exact where the scales have 16 bits, else rounded once."""
        if self.offsets is None:
            codes = self.codes.astype(np.float32) - np.float32(1 << (self.bits - 1))
            return codes * _columns(self.scales, self.group, codes.shape[1])
        k = self.codes.shape[1]
        wide = self.codes * _columns(self.scales, self.group, k).astype(np.float64)
        return (wide + _columns(self.offsets, self.group, k)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of a matrix in FP8 E4M3: weight[r, c] = E4M3[codes[r, c]] * scales[r, c // group].

    Args:
        codes: uint8 [rows, k].
        group: columns that share a scale: 128, or k (a scale per row); blocks and tensors' scales come as their rows'.
        scales: f32 [rows, ceil(k / group)].
    """

    codes: U8Array
    group: int
    scales: F32Array

    def __len__(self) -> int:
        return len(self.codes)

    def dequantised(self) -> F32Array:
        """The weights, f32 [rows, k]: exact where the scales have 16 bits, else rounded once."""
        values: F32Array = E4M3[self.codes]
        return values * _columns(self.scales, self.group, values.shape[1])


def _columns(of_groups: F32Array, group: int, k: int) -> F32Array:
    """A group's value at each of its columns: [rows, ceil(k / group)] -> [rows, k], or [rows, 1] of whole rows."""
    return of_groups if of_groups.shape[1] == 1 else np.repeat(of_groups, group, axis=1)[:, :k]

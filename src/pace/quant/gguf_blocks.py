"""The quantised blocks of GGUF files as rows of small integers, exactly.

A row is a run of blocks of 32 or 256 values. In the small ones a 16-bit scale (and a minimum) stands before the codes; the
large ones ("K") have eight or sixteen groups whose scales are small integers themselves, times one or two 16-bit scales:
the product of both has at most 19 bits, so it is exact in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from pace.quant.groups import F32Array, GroupedRows, U8Array

__all__ = ["BLOCKS", "Blocks", "grouped"]


_FOUR: Final = np.uint8(4)


class Blocks(NamedTuple):
    """One type of blocks.

    Args:
        bits: of a code in `GroupedRows`.
        group: values that share a scale.
        read: blocks u8 [n, bytes] -> codes [n, values], scales [n, groups], offsets the same or None.
    """

    bits: int
    group: int
    read: Callable[[U8Array], tuple[U8Array, F32Array, F32Array | None]]


def grouped(kind: str, rows: U8Array) -> GroupedRows:
    """Rows of blocks.

    Args:
        kind: a key of `BLOCKS`.
        rows: the bytes of each row, u8 [rows, bytes].
    """
    bits, group, read = BLOCKS[kind]
    n = len(rows)
    codes, scales, offsets = read(rows.reshape(-1, _BYTES[kind]))
    return GroupedRows(
        codes.reshape(n, -1),
        bits,
        group,
        scales.reshape(n, -1),
        None if offsets is None else offsets.reshape(n, -1),
    )


def _f16(blocks: U8Array, at: int) -> F32Array:
    """The number at a byte of each block, f32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _halves(qs: U8Array) -> U8Array:
    """Codes of bytes whose low nibbles are the first half of the values, and whose high ones the second."""
    return np.concatenate((qs & 15, qs >> 4), axis=-1)


def _fifth_bits(qh: U8Array) -> U8Array:
    """Bits of 4 bytes [n, 4], the lowest first, in the place of a code's fifth: [n, 32]."""
    return np.unpackbits(qh, axis=-1, bitorder="little") << _FOUR


def _q4_0(blocks: U8Array) -> tuple[U8Array, F32Array, None]:
    return _halves(blocks[:, 2:]), _f16(blocks, 0), None


def _q4_1(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    return _halves(blocks[:, 4:]), _f16(blocks, 0), _f16(blocks, 2)


def _q5_0(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    scales = _f16(blocks, 0)
    return _halves(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), scales, np.float32(-16) * scales


def _q5_1(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    return _halves(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _f16(blocks, 0), _f16(blocks, 2)


def _q8_0(blocks: U8Array) -> tuple[U8Array, F32Array, None]:
    return (
        blocks[:, 2:] ^ np.uint8(128),
        _f16(blocks, 0),
        None,
    )  # two's complement with the sign flipped is the code


def _k_scales(packed: U8Array) -> tuple[U8Array, U8Array]:
    """Eight scales and eight minima of 6 bits out of 12 bytes: [n, 8] each."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (rest & 15) | (first >> 6) << 4), axis=-1)
    minima = np.concatenate((second & 63, rest >> 4 | (second >> 6) << 4), axis=-1)
    return scales, minima


def _k_parts(blocks: U8Array) -> tuple[F32Array, F32Array]:
    """Scales and offsets of the eight groups of Q4_K and Q5_K."""
    scales, minima = _k_scales(blocks[:, 4:16])
    return _f16(blocks, 0) * scales, -_f16(blocks, 2) * minima


def _q4_k(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    qs = blocks[:, 16:].reshape(-1, 4, 32)  # each 32 bytes are two groups
    return _halves(qs).reshape(-1, 256), *_k_parts(blocks)


def _q5_k(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    low = _halves(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of byte l belongs to value l of group g.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)) << _FOUR
    return (low | fifth).reshape(-1, 256), *_k_parts(blocks)


def _q6_k(blocks: U8Array) -> tuple[U8Array, F32Array, F32Array]:
    ql = blocks[:, :128].reshape(-1, 2, 64)  # for each half of the block
    qh = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (qh >> shifts & np.uint8(3)) << _FOUR  # [n, 2, 4, 32]
    codes = _halves(ql).reshape(-1, 2, 4, 32) | high
    scales = _f16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return codes.reshape(-1, 256), scales, np.float32(-32) * scales


BLOCKS: Final[Mapping[str, Blocks]] = {
    "Q4_0": Blocks(4, 32, _q4_0),
    "Q4_1": Blocks(4, 32, _q4_1),
    "Q5_0": Blocks(8, 32, _q5_0),
    "Q5_1": Blocks(8, 32, _q5_1),
    "Q8_0": Blocks(8, 32, _q8_0),
    "Q4_K": Blocks(4, 32, _q4_k),
    "Q5_K": Blocks(8, 32, _q5_k),
    "Q6_K": Blocks(8, 16, _q6_k),
}
"""By the name that llama.cpp gives a type."""
_BYTES: Final = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
}  # fmt: skip

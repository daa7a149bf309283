"""Where a plan's weights end up: packed by the team that will read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.models.plan import F32Array, Plan, WeightShape
from pace.models.tensors import SourcePart
from pace.quant.groups import Fp8Rows, GroupedRows

__all__ = ["PackedSink", "Weight", "invent_weights"]

Weight = ops.PackedMatrix | F32Array | ops.MappedTable
"""As `ops.Plan` takes them."""


class PackedSink:
    """Receives a plan's weights: matrices are packed by the team that will read them, vectors kept as f32."""

    def __init__(self, team: ops.Team) -> None:
        self.team = team
        self.weights: dict[str, Weight] = {}

    def matrix(self, name: str, shape: WeightShape, parts: Iterator[SourcePart]) -> None:
        """Pack matrices [n, k] part by part."""
        packed = ops.PackedMatrix(self.team, shape.n, shape.k or 1, shape.count, shape.format)
        for array, dtype, at, mode, matrix, scales in parts:
            if isinstance(array, GroupedRows) and shape.format.startswith("int"):
                packed.pack_groups(array, at, mode, matrix)
            elif isinstance(array, Fp8Rows) and shape.format.startswith("fp8"):
                packed.pack_fp8(array, at, mode, matrix)
            elif isinstance(array, GroupedRows | Fp8Rows):
                packed.pack(array.dequantised(), "f32", at, mode, matrix)
            elif scales is None:
                packed.pack(array, dtype, at, mode, matrix)
            else:
                packed.pack_mxfp4(array, scales, at, mode, matrix)
        self.weights[name] = packed

    def vector(self, name: str, values: F32Array) -> None:
        """Keep a vector [n]."""
        self.weights[name] = values

    def table(self, name: str, rows: npt.NDArray[Any], dtype: str) -> None:
        """Keep a view of a mapped table [n, k]."""
        self.weights[name] = ops.MappedTable(rows, dtype)

    def packed(self, name: str, weight: Weight) -> None:
        """Keep what was packed before."""
        self.weights[name] = weight

    @property
    def n_bytes(self) -> int:
        """Bytes of everything received; a mapped table is the file's."""
        return sum(w.nbytes for w in self.weights.values() if not isinstance(w, ops.MappedTable))


def invent_weights(plan: Plan, sink: PackedSink) -> None:
    """Random weights of a plausible size: matrices of variance 1 / k, norms of 1, biases of 0."""
    # Slices of one bank: fresh normals for a billion parameters would take longer than the benchmark.
    rng = np.random.default_rng(0)
    bank = rng.standard_normal(1 << 22, dtype=np.float32)
    codes = rng.integers(0, 256, 1 << 22, np.uint8)
    for name, shape in plan.weights.items():
        if shape.k is None:
            value = 0.0 if name.endswith("bias") else 1.0
            size = (shape.n,) if shape.count == 1 else (shape.count, shape.n)
            sink.vector(name, np.full(size, value, np.float32))
        else:
            make = _bank_blocks(codes, shape) if shape.format == "mxfp4" else _bank_rows(bank, shape)
            sink.matrix(name, shape, make)


def _bank_rows(bank: F32Array, shape: WeightShape) -> Iterator[SourcePart]:
    k = shape.k or 1
    rng = np.random.default_rng(shape.n * k)
    for matrix, at, rows in _pieces(shape, len(bank) // 2 // k):
        first = int(rng.integers(0, max(1, len(bank) - rows * k)))
        values = np.resize(bank[first : first + rows * k], rows * k).reshape(rows, k)
        yield SourcePart(values * np.float32(k**-0.5), "f32", at, "rows", matrix)


def _bank_blocks(bank: npt.NDArray[np.uint8], shape: WeightShape) -> Iterator[SourcePart]:
    blocks = (shape.k or 1) // 32  # of a row
    rng = np.random.default_rng(shape.n * blocks)
    # Codes are evenly spread over values whose mean square is 9.6, scales 127 + e of 2^e.
    exponent = round(-np.log2(9.6 * (shape.k or 1)) / 2)
    for matrix, at, rows in _pieces(shape, len(bank) // 32 // blocks):
        size = rows * blocks * 16
        first = int(rng.integers(0, max(1, len(bank) - size)))
        codes = np.resize(bank[first : first + size], size).reshape(rows, blocks, 16)
        scales = np.full((rows, blocks), 127 + exponent, np.uint8)
        yield SourcePart(codes, "mxfp4", at, "rows", matrix, scales)


def _pieces(shape: WeightShape, most: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, rows) of a weight's rows, about `most` of them at a time."""
    step = max(16, most // 16 * 16)
    for matrix in range(shape.count):
        for at in range(0, shape.n, step):
            yield matrix, at, min(step, shape.n - at)

"""Where a plan's weights end up: packed by the team that will read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pace import ops
from pace.models.plan import F32Array, Plan
from pace.models.weights import SourcePart

__all__ = ["PackedSink", "invent_weights"]


class PackedSink:
    """Receives a plan's weights: matrices are packed by the team that will read them, vectors kept as f32."""

    def __init__(self, team: ops.Team) -> None:
        self.team = team
        self.weights: dict[str, ops.PackedMatrix | F32Array | ops.MappedTable] = {}

    def matrix(self, name: str, n: int, k: int, parts: Iterator[SourcePart]) -> None:
        """Pack a matrix [n, k] part by part."""
        packed = ops.PackedMatrix(self.team, n, k)
        for array, dtype, at, mode in parts:
            packed.pack(array, dtype, at, mode)
        self.weights[name] = packed

    def vector(self, name: str, values: F32Array) -> None:
        """Keep a vector [n]."""
        self.weights[name] = values

    def table(self, name: str, rows: npt.NDArray[Any], dtype: str) -> None:
        """Keep a view of a mapped table [n, k]."""
        self.weights[name] = ops.MappedTable(rows, dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of everything received; a mapped table is the file's."""
        return sum(w.nbytes for w in self.weights.values() if not isinstance(w, ops.MappedTable))


def invent_weights(plan: Plan, sink: PackedSink) -> None:
    """Random weights of a plausible size: matrices of variance 1 / k, norms of 1, biases of 0."""
    # Slices of one bank: fresh normals for a billion parameters would take longer than the benchmark.
    bank = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    for name, shape in plan.weights().items():
        if shape.k is None:
            sink.vector(name, np.full(shape.n, 0.0 if name.endswith("bias") else 1.0, np.float32))
        else:
            sink.matrix(name, shape.n, shape.k, _bank_rows(bank, shape.n, shape.k))


def _bank_rows(bank: F32Array, n: int, k: int) -> Iterator[SourcePart]:
    step = max(16, (len(bank) // 2 // k) // 16 * 16)
    rng = np.random.default_rng(n * k)
    for at in range(0, n, step):
        rows = min(step, n - at)
        first = int(rng.integers(0, max(1, len(bank) - rows * k)))
        values = np.resize(bank[first : first + rows * k], rows * k).reshape(rows, k)
        yield SourcePart(values * np.float32(k**-0.5), "f32", at, "rows")

"""AWQ as its GEMM version stores it: integers of 4 bits, 8 rows to a word in an order of their own."""

from __future__ import annotations

from typing import Final

import numpy as np

from pace.errors import WeightsError
from pace.quant.groups import F32Array, U8Array
from pace.quant.matrices import IntegerMatrix, Matrix, Rows, Tensor, Tensors, floats, require, unpack
from pace.quant.scheme import Scheme

_FIELD: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which field of a word holds the first, second ... of its 8 rows."""


def open_awq(module: str, tensors: Tensors, scheme: Scheme) -> Matrix:
    """A matrix [n, k] of `qweight` [k, n / 8], `qzeros` [groups, n / 8] and `scales` [groups, n].

    A weight is (q - z) * scale; nothing is added to z, which may be 0.
    """
    weight, zeros, scales = require(module, tensors, "qweight", "qzeros", "scales")
    scales.check(("F16", "BF16", "F32"))
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise WeightsError(f"{weight.name} is {list(weight.shape)}, expected [columns, rows / 8]")
    k, n = weight.shape[0], weight.shape[1] * 8
    size = None if scheme.block is None else scheme.block[1]
    group = k if size is None else min(size, k)
    n_groups = -(-k // group)
    weight.check(("I32",))
    zeros.check(("I32",), (n_groups, n // 8))
    scales.check((scales.dtype,), (n_groups, n))

    def codes(part: Rows) -> U8Array:
        return _rows(weight, part)

    def scale(part: Rows) -> F32Array:
        return floats(scales.read()[:, part].T, scales.dtype)

    return IntegerMatrix(weight.name, (n, k), 4, group, codes, scale, lambda part: _rows(zeros, part))


def _rows(tensor: Tensor, part: Rows) -> U8Array:
    """Rows [rows, ...] of a tensor [..., n / 8] of 8 rows a word."""
    rows = np.arange(part.start, part.stop, part.step)
    first, end = part.start // 8, -(-part.stop // 8)
    fields = unpack(tensor.read()[:, first:end], 4, 8 * (end - first))
    at = rows // 8 * 8 + _FIELD[rows % 8] - 8 * first
    return np.ascontiguousarray(fields[:, at].T)

"""GPTQ: integers packed down the columns; what AutoGPTQ, GPTQModel and AutoRound write."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.quant.groups import F32Array, U8Array
from pace.quant.matrices import (
    IntegerMatrix,
    Matrix,
    Rows,
    Tensor,
    Tensors,
    floats,
    ordered,
    require,
    unpack,
)
from pace.quant.scheme import Scheme


def open_gptq(module: str, tensors: Tensors, scheme: Scheme) -> Matrix:
    """A matrix [n, k] of `qweight` [k * bits / 32, n], `qzeros` [groups, n * bits / 32] and `scales` [groups, n].

    `g_idx` [k], where there is one, says which group a column belongs to (desc_act).
    """
    weight, zeros, scales = require(module, tensors, "qweight", "qzeros", "scales")
    bits = scheme.bits
    scales.check(("F16", "BF16", "F32"))
    if (
        len(scales.shape) != 2
        or len(weight.shape) != 2
        or 0 in weight.shape
        or scales.shape[1] != weight.shape[1]
    ):
        raise WeightsError(
            f"{scales.name} is {list(scales.shape)}, expected [groups, rows] beside {weight.name} {list(weight.shape)}"
        )
    n_groups, n = scales.shape
    k = weight.shape[0] * 32 // bits
    size = scheme.block[1] if scheme.block is not None else None
    group = k if size is None else min(size, k)
    weight.check(("I32",), (-(-k * bits // 32), n))
    scales.check((scales.dtype,), (-(-k // group), n))
    zeros.check(("I32",), (n_groups, -(-n * bits // 32)))

    @functools.cache  # of all rows: few, and only together they show how they are stored
    def zero_points() -> npt.NDArray[np.uint8] | None:
        return _zero_points(zeros, scheme, n)

    def codes(part: Rows) -> U8Array:
        return unpack(weight.read()[:, part].T, bits, k)

    def scale(part: Rows) -> F32Array:
        return floats(scales.read()[:, part].T, scales.dtype)

    def zero(part: Rows) -> npt.NDArray[np.uint8] | None:
        found = zero_points()
        return None if found is None else found[part]

    matrix = IntegerMatrix(weight.name, (n, k), bits, group, codes, scale, zero)
    return ordered(matrix, tensors.get("g_idx"))


def _zero_points(tensor: Tensor, scheme: Scheme, n: int) -> npt.NDArray[np.uint8] | None:
    """z of every row and group [n, groups]; None: all in the middle.

    Files of the first version store z - 1 in as many bits, so that 0 became 2^bits - 1. Labels lie, so where all are
    symmetric, the values say which version it is.
    """
    fields = unpack(tensor.read(), scheme.bits, n).T
    middle = 1 << scheme.bits - 1
    if scheme.symmetric and (fields == fields.flat[0]).all() and fields.flat[0] in (middle, middle - 1):
        return None
    zeros = fields + np.uint8(scheme.zero_at) & np.uint8((1 << scheme.bits) - 1)
    return None if (zeros == middle).all() else zeros

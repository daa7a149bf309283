"""A `weight` of int8 or FP8 with its scales beside it: compressed-tensors' unpacked formats, FP8 checkpoints, Quark and
modelopt exports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.quant.groups import U8Array
from pace.quant.matrices import (
    Fp8Matrix,
    IntegerMatrix,
    Matrix,
    Rows,
    Tensors,
    matrix_shape,
    ordered,
    require,
    spread_scales,
)
from pace.quant.scheme import Scheme

SCALES = ("weight_scale", "weight_scale_inv")
"""Both multiply, whatever the second is called."""


def open_plain(module: str, tensors: Tensors, scheme: Scheme) -> Matrix:
    """A matrix [n, k] of `weight`, F8_E4M3 or I8, and `weight_scale`; asymmetric integers have `weight_zero_point`, and
    `weight_g_idx` says which group a column belongs to (actorder).

    Scales of activations (`input_scale`) are left: pace's activations are bf16, or have scales of their own.
    """
    (weight,) = require(module, tensors, "weight")
    weight.check(("F8_E4M3",) if scheme.kind == "float" else ("I8",))
    named = [end for end in SCALES if end in tensors]
    if len(named) > 1:
        raise WeightsError(f"{module} has {SCALES[0]} and {SCALES[1]}; expected one of them")
    (scales,) = require(module, tensors, *(named or SCALES[:1]))
    shape = matrix_shape(weight)
    group, spread = spread_scales(scales, shape, scheme.block)
    groups = tensors.get("weight_g_idx")
    if scheme.kind == "float":
        if groups is not None:
            raise WeightsError(
                f"{groups.name} orders columns of FP8, which is not read; quantise the model again without actorder"
            )
        return Fp8Matrix(weight.name, shape, group, lambda part: weight.read()[part], spread)
    zeros = None if scheme.symmetric else _zeros(module, tensors, shape[0])
    matrix = IntegerMatrix(
        weight.name, shape, 8, group, lambda part: shifted(weight.read()[part]), spread, zeros
    )
    return ordered(matrix, groups)


def shifted(codes: npt.NDArray[np.int8]) -> U8Array:
    """q as q + 128."""
    return codes.view(np.uint8) ^ np.uint8(128)


def _zeros(module: str, tensors: Tensors, n: int) -> Callable[[Rows], npt.NDArray[Any]]:
    zero, scales = require(module, tensors, "weight_zero_point", "weight_scale")
    zero.check(("I8",), scales.shape)
    if math.prod(zero.shape) != 1 and zero.shape[0] != n:
        raise WeightsError(f"{zero.name} is {list(zero.shape)}, expected one zero point, or rows of them")

    def read(part: Rows) -> npt.NDArray[Any]:
        zeros = shifted(zero.read())
        zeros = zeros.reshape(1 if zeros.size == 1 else n, -1)
        return np.broadcast_to(zeros, (n, zeros.shape[1]))[part]

    return read

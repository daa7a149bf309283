"""NVFP4: E2M1 codes, two to a byte, an E4M3 scale for each 16 columns, and one scale for the whole matrix.

Twice an E2M1 value is an integer from -12 to 12, so a matrix is exact as int8 in groups of 16: 10 bits a weight beside the
file's 4.5. A form of its own would need kernels of its own.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from pace.errors import WeightsError
from pace.quant.groups import E4M3, F32Array, U8Array
from pace.quant.matrices import IntegerMatrix, Matrix, Rows, Tensor, Tensors, floats, matrix_shape, require
from pace.quant.scheme import Scheme

ENDS: Final = ("weight_global_scale", "weight_scale_2", "input_global_scale")
"""Ends of names that no other layout has."""

_GROUP: Final = 16
_TWICE: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int16)
_CODES: Final = (128 + np.concatenate([_TWICE, -_TWICE])).astype(np.uint8)
"""Of each E2M1 code twice its value, 128 in the middle."""


def open_nvfp4(module: str, tensors: Tensors, scheme: Scheme) -> Matrix:
    """A matrix [n, k] of bytes [n, k / 2], low nibble first, and `weight_scale` [n, k / 16].

    compressed-tensors has the bytes in `weight_packed` and divides by `weight_global_scale`; modelopt has them in `weight`
    and multiplies by `weight_scale_2`. Scales of activations are left, as pace's are finer than FP4.
    """
    divides = "weight_packed" in tensors
    packed, scales, whole = require(
        module,
        tensors,
        *(
            ("weight_packed", "weight_scale", "weight_global_scale")
            if divides
            else ("weight", "weight_scale", "weight_scale_2")
        ),
    )
    n, half = matrix_shape(packed.check(("U8",)))
    if half % (_GROUP // 2):
        raise WeightsError(f"{packed.name} has {2 * half} columns, expected a multiple of {_GROUP}")
    scales.check(("F8_E4M3",), (n, 2 * half // _GROUP))
    factor = _factor(whole, divides)

    def codes(part: Rows) -> U8Array:
        stored = packed.read()[part]
        return _CODES[np.stack((stored & 15, stored >> 4), axis=-1).reshape(len(stored), -1)]

    def scale(part: Rows) -> F32Array:
        values: F32Array = E4M3[scales.read()[part]]
        # The product with half a code is that of the tools, which divide in f32, too: halves are exact.
        return (values / factor if divides else values * factor) * np.float32(0.5)

    return IntegerMatrix(packed.name, (n, 2 * half), 8, _GROUP, codes, scale)


def _factor(tensor: Tensor, divides: bool) -> np.float32:
    """The scale of the whole matrix."""
    if tensor.check(("F32", "BF16", "F16")).shape not in ((), (1,)):
        raise WeightsError(f"{tensor.name} is {list(tensor.shape)}, expected one number")
    value = np.float32(floats(tensor.read(), tensor.dtype).reshape(-1)[0])
    if not np.isfinite(value) or (divides and value == 0):
        raise WeightsError(
            f"{tensor.name} holds {value}, expected a finite number; make the checkpoint again"
        )
    return value

"""compressed-tensors' pack-quantized: integers of 2 to 8 bits in words of 32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.quant.groups import U8Array
from pace.quant.matrices import (
    IntegerMatrix,
    Matrix,
    Tensor,
    Tensors,
    ordered,
    require,
    spread_scales,
    unpack,
)
from pace.quant.scheme import Scheme


def open_packed(module: str, tensors: Tensors, scheme: Scheme) -> Matrix:
    """A matrix of `weight_packed`, rows of fields q + 2^(bits - 1), `weight_scale` and `weight_shape`.

    The zero points of asymmetric ones are packed in the same way, but down the rows. `weight_g_idx` says which group a
    column belongs to (actorder).
    """
    packed, scales, sizes = require(module, tensors, "weight_packed", "weight_scale", "weight_shape")
    n, k = sizes.check(("I64", "I32"), (2,)).read().tolist()
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
        raise WeightsError(f"{sizes.name} holds {[n, k]}, expected rows and columns of a matrix")
    group, spread = spread_scales(scales, (n, k), scheme.block)
    bits, stream = scheme.bits, _is_stream(packed, scheme.bits, n, k)
    zeros = None
    if not scheme.symmetric:
        (zero,) = require(module, tensors, "weight_zero_point")
        zero.check(("I32",), (_words(n, bits, stream), -(-k // group)))
        zeros = lambda part: _fields(zero.read().T, bits, n, stream).T[part]  # noqa: E731  # a function of one line, as those below
    matrix = IntegerMatrix(
        packed.name,
        (n, k),
        bits,
        group,
        lambda part: _fields(packed.read()[part], bits, k, stream),
        spread,
        zeros,
    )
    return ordered(matrix, tensors.get("weight_g_idx"))


def _words(count: int, bits: int, stream: bool) -> int:
    """Of 32 bits, for so many fields: a stream, or no field in two words."""
    return -(-count * bits // 32) if stream else -(-count // (32 // bits))


def _is_stream(packed: Tensor, bits: int, n: int, k: int) -> bool:
    """Whether rows are streams of bits; until May 2026 no field of 3, 5, 6 or 7 bits lay in two words. The width tells.

    Raises:
        WeightsError: it is neither's, or both have it and lay fields out differently.
    """
    stream, whole = _words(k, bits, True), _words(k, bits, False)
    if packed.check(("I32",)).shape not in ((n, stream), (n, whole)):
        raise WeightsError(
            f"{packed.name} is {list(packed.shape)}, expected {[n, stream]} for {k} fields of {bits} bits a row"
        )
    if stream == whole and k > 32 // bits and 32 % bits:
        raise WeightsError(
            f"{packed.name}: {k} fields of {bits} bits take {stream} words in the older and the newer packing of "
            "compressed-tensors, so nobody can tell which it is; quantise the model again with 4 or 8 bits"
        )
    return packed.shape[1] == stream


def _fields(words: npt.NDArray[np.int32], bits: int, count: int, stream: bool) -> U8Array:
    """Fields [rows, count] of words [rows, width]."""
    if stream:
        return unpack(words, bits, count)
    shifts = np.arange(0, 32 // bits * bits, bits, dtype=np.uint32)
    fields = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)[:, :count]

"""GPTQ: rows rounded one column after the other, each with the errors of those before it in mind.

Of rows W [n, k] that meet inputs X [rows, k], rounding to Q changes the outputs by X (W - Q)^T, whose square is the trace
of (W - Q) H (W - Q)^T with H = X^T X. With H = F D F^T, F upper triangular with ones on its diagonal, that is the sum over
columns j of D_j (target_j - Q_j)^2, where target_j is W_j plus the errors W - Q of the columns before, times those of F_j:
each column is rounded to the nearest of its target. (The paper inverts H and pushes errors forward by the inverse's factor.
This gives the same codes with one factorisation and no inverse.)

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; Chee et al., "QuIP".
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pace.quant.groups import F32Array, U8Array

__all__ = ["Hessian", "round_rows", "to_bf16"]

F64Array = npt.NDArray[np.float64]

_BLOCK: Final = 128  # columns whose errors reach the columns behind them in one product
_DAMPING: Final = 0.01  # of the mean of the diagonal, added to it
_TRIALS: Final = (
    1.0,
    *(0.7 + 0.03 * i for i in range(16)),
)  # scales of a group, as parts of that of its extreme
_ROWS: Final = 4096  # of inputs that are added up in f32 at a time


class Hessian:
    """X^T X of all inputs that a matrix meets.

    Args:
        k: columns of the inputs.
    """

    def __init__(self, k: int) -> None:
        self.sums: F64Array = np.zeros((k, k))

    def add(self, rows: npt.NDArray[np.uint16]) -> None:
        """Inputs, bf16 [rows, k]."""
        for at in range(0, len(rows), _ROWS):
            x = (rows[at : at + _ROWS].astype(np.uint32) << 16).view(np.float32)
            self.sums += x.T @ x

    def factor(self) -> tuple[F32Array, F32Array]:
        """F and D of H = F D F^T, f32 [k, k] and [k]; a column that no input has weighs what the damping adds."""
        damped = self.sums.copy()
        mean = float(np.diag(damped).mean()) or 1.0
        damped.flat[:: len(damped) + 1] += _DAMPING * mean
        # The lower factor of the matrix turned around is the upper one of the matrix.
        upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        diagonal = np.diag(upper)
        return (upper / diagonal).astype(np.float32), (diagonal**2).astype(np.float32)


def round_rows(
    weights: F32Array, factor: tuple[F32Array, F32Array], bits: int, group: int
) -> tuple[U8Array, F32Array]:
    """Rows as integers that change least what they make of their inputs.

    Args:
        weights: [n, k].
        factor: of `Hessian.factor`.
        bits: 4 or 8.
        group: columns that share a scale; k: all.

    Returns:
        Codes [n, k], integers with 2^(bits - 1) added, and scales of 16 bits as f32 [n, k / group].
    """
    upper, weight = factor
    n, k = weights.shape
    targets = np.ascontiguousarray(weights.T)
    codes = np.empty((k, n), np.int8)
    scales = np.empty((k // group, n), np.float32)
    errors = np.empty((k, n), np.float32)
    for first in range(0, k, _BLOCK):
        end = min(first + _BLOCK, k)
        block = targets[first:end] + upper[:first, first:end].T @ errors[:first]
        for j in range(first, end):
            if j % group == 0:
                ahead = block[j - first : j - first + group] if group <= _BLOCK else targets
                scales[j // group] = _scales(ahead, weight[j : j + group], bits)
            scale = scales[j // group]
            codes[j] = _nearest(block[j - first], scale, bits)
            errors[j] = targets[j] - codes[j] * scale
            block[j - first + 1 :] += np.outer(upper[j, j + 1 : end], errors[j])
    zero = np.uint8(1 << (bits - 1))
    return np.ascontiguousarray(codes.T).view(np.uint8) + zero, np.ascontiguousarray(scales.T)


def _nearest(values: F32Array, scale: F32Array, bits: int) -> F32Array:
    """Steps of a scale, f32 integers; 0 where the scale is."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    most = 1 << (bits - 1)
    return np.clip(np.rint(values * inverse), -most, most - 1)


def _scales(values: F32Array, weight: F32Array, bits: int) -> F32Array:
    """The scale of each column of values [group, n]: [n], bf16."""
    size = np.abs(values)
    if bits == 8:
        return to_bf16(size.max(axis=0) / 127)
    extreme = np.take_along_axis(values, size.argmax(axis=0)[None], axis=0)[0] / -8
    best, least = to_bf16(extreme), np.full(len(extreme), np.inf, np.float32)
    for trial in _TRIALS:
        scale = to_bf16(extreme * trial)
        error = weight @ np.square(values - _nearest(values, scale, bits) * scale)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def to_bf16(values: F32Array) -> F32Array:
    """To the nearest numbers of bf16, as f32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: F32Array = (bits + (0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded

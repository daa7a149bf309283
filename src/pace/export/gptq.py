"""GPTQ: rows rounded one column after the other, each with the errors of those before it in mind.

Of rows W [n, k] that meet inputs X [rows, k], rounding to Q changes the outputs by X (W - Q)^T, whose square is the trace
of (W - Q) H (W - Q)^T with H = X^T X. With H = F D F^T, F upper triangular with ones on its diagonal, that is the sum over
columns j of D_j (target_j - Q_j)^2, where target_j is W_j plus the errors W - Q of the columns before, times those of F_j:
each column is rounded to the nearest of its target. (The paper inverts H and pushes errors forward by the inverse's factor.
This gives the same codes with one factorisation and no inverse.)

Each group's scale is chosen when its first column comes, by the errors weighed by D. What is found so is a start: with all
codes known, integers of 4 bits are settled again, group by group, each code and then the group's scale at what is best for
the sum above with all others held. Each of these steps lowers the sum.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; Chee et al., "QuIP".
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pace.quant.groups import F32Array, U8Array

__all__ = ["Hessian", "Loss", "round_rows", "to_bf16"]

F64Array = npt.NDArray[np.float64]
I8Array = npt.NDArray[np.int8]

_BLOCK: Final = 128  # columns whose errors reach the columns behind them in one product
_DAMPING: Final = 0.1  # of the mean of the diagonal, added to it
_SWEEPS: Final = 2  # over all groups; a third gains a fifth of what two do
_TRIALS: Final = (
    1.0,
    *(0.7 + 0.03 * i for i in range(16)),
)  # scales of a group, as parts of that of its extreme
_ROWS: Final = 4096  # of inputs that are added up in f32 at a time
_DEPTH: Final = 64  # columns of the left matrix that a part of a product takes
_PART: Final = 1 << 18  # multiplications of a part


class Loss(NamedTuple):
    """What errors of a row cost: e H e^T, H = F D F^T with what damping adds.

    Args:
        sums: H, f32 [k, k].
        upper: F, f32 [k, k].
        weight: D, f32 [k].
    """

    sums: F32Array
    upper: F32Array
    weight: F32Array


class Hessian:
    """X^T X of all inputs that a matrix meets.

    Args:
        k: columns of the inputs.
    """

    def __init__(self, k: int) -> None:
        self.sums: F64Array = np.zeros((k, k))

    def add(self, rows: npt.NDArray[np.uint16], times: int = 1) -> None:
        """Inputs, bf16 [rows, k], as often as they count."""
        for at in range(0, len(rows), _ROWS):
            x = (rows[at : at + _ROWS].astype(np.uint32) << 16).view(np.float32)
            self.sums += times * (x.T @ x)

    def loss(self) -> Loss:
        """With the damping: a column that no input has weighs what that adds."""
        damped = self.sums.copy()
        mean = float(np.diag(damped).mean()) or 1.0
        damped.flat[:: len(damped) + 1] += _DAMPING * mean
        # The lower factor of the matrix turned around is the upper one of the matrix.
        upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        diagonal = np.diag(upper)
        return Loss(
            damped.astype(np.float32),
            (upper / diagonal).astype(np.float32),
            (diagonal**2).astype(np.float32),
        )


def round_rows(weights: F32Array, loss: Loss, bits: int, group: int) -> tuple[U8Array, F32Array]:
    """Rows as integers that change least what they make of their inputs.

    Args:
        weights: [n, k].
        loss: of the inputs.
        bits: 4 or 8.
        group: columns that share a scale; k: all.

    Returns:
        Codes [n, k], integers with 2^(bits - 1) added, and scales of 16 bits as f32 [n, k / group].
    """
    targets = np.ascontiguousarray(weights.T)
    codes, scales = _in_turn(targets, loss, bits, group)
    for _ in range(_SWEEPS if bits == 4 else 0):  # of 8 bits the first codes are as good as bf16
        _settle(targets, codes, scales, loss.sums)
    zero = np.uint8(1 << (bits - 1))
    return np.ascontiguousarray(codes.T).view(np.uint8) + zero, np.ascontiguousarray(scales.T)


def _in_turn(targets: F32Array, loss: Loss, bits: int, group: int) -> tuple[I8Array, F32Array]:
    """Columns [k, n] one after the other: codes, int8 [k, n], and scales [k / group, n]."""
    upper, weight = loss.upper, loss.weight
    k, n = targets.shape
    codes = np.empty((k, n), np.int8)
    scales = np.empty((k // group, n), np.float32)
    errors = np.empty((k, n), np.float32)
    for first in range(0, k, _BLOCK):
        end = min(first + _BLOCK, k)
        block = targets[first:end] + _product(upper[:first, first:end].T, errors[:first])
        for j in range(first, end):
            if j % group == 0:
                ahead = block[j - first : j - first + group] if group <= _BLOCK else targets
                scales[j // group] = _scales(ahead, weight[j : j + group], bits)
            scale = scales[j // group]
            codes[j] = _nearest(block[j - first], scale, bits)
            errors[j] = targets[j] - codes[j] * scale
            block[j - first + 1 :] += np.outer(upper[j, j + 1 : end], errors[j])
    return codes, scales


def _settle(targets: F32Array, codes: I8Array, scales: F32Array, sums: F32Array) -> None:
    """Codes of 4 bits and scales of whole columns [k, n], each at the best with the others held, over what they were."""
    group = len(targets) // len(scales)
    errors = targets - codes * np.repeat(scales, group, axis=0)
    for g, scale in enumerate(scales):
        columns = slice(g * group, (g + 1) * group)
        inner, error, code = sums[columns, columns], errors[columns], codes[columns]
        slope = _product(sums[columns], errors)
        for j in range(group):
            free = error[j] - slope[j] / inner[j, j]
            code[j] = _nearest(targets[g * group + j] - free, scale, 4)
            change = targets[g * group + j] - code[j] * scale - error[j]
            error[j] += change
            slope += np.outer(inner[j], change)
        slopes, steepness = (code * slope).sum(axis=0), (code * (inner @ code)).sum(axis=0)
        more = np.divide(slopes, steepness, out=np.zeros_like(scale), where=steepness > 0)
        more = to_bf16(scale + more) - scale
        more[more * (more * steepness - 2 * slopes) >= 0] = 0  # rounded too far
        scale += more
        error -= code * more


def _product(left: F32Array, right: F32Array) -> F32Array:
    """left @ right, in parts that numpy's OpenBLAS leaves to the thread that asks.

    Larger ones it divides among threads of its own, and who asks spins until they are done: beside the threads that round,
    on two cores that others use too, the CPU went there (30 s of it for 7 matrices of SmolLM2-135M, in parts 16 s for 20 at
    the same time). By itself a product takes 1.8 to 2.7 times as long in parts, all of the rounding 1.2 to 1.5 times.
    """
    (m, k), n = left.shape, right.shape[1]
    width = max(1, _PART // (m * _DEPTH))
    result = np.zeros((m, n), np.float32)
    for at in range(0, k, _DEPTH):
        depth = slice(at, at + _DEPTH)
        for first in range(0, n, width):
            columns = slice(first, first + width)
            result[:, columns] += left[:, depth] @ right[depth, columns]
    return result


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

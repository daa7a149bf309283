"""A quantised matrix of a checkpoint: what every format's reader makes of its tensors, and how rows come out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pace.errors import WeightsError
from pace.quant.groups import F32Array, Fp8Rows, GroupedRows, U8Array

__all__ = [
    "Block",
    "ByGroup",
    "DenseMatrix",
    "Fp8Matrix",
    "IntegerMatrix",
    "Matrix",
    "QuantisedRows",
    "Rows",
    "Tensor",
    "TensorSource",
    "Tensors",
    "by_group",
    "floats",
    "matrix_shape",
    "ordered",
    "require",
    "spread_scales",
    "unpack",
]

QuantisedRows = GroupedRows | Fp8Rows
Rows = slice
"""Rows of a matrix, with a step of 1 or more."""

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all."""

_FLOATS: Final = ("BF16", "F16", "F32", "F8_E8M0")


class TensorSource(Protocol):
    """A checkpoint's tensors by the file's own names."""

    def info(self, name: str) -> Any:
        """What the header says: `dtype` and `shape`."""
        ...

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A view of the data."""
        ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, not yet read.

    Args:
        name: the file's own.
        source: of its data.
    """

    name: str
    source: TensorSource

    @property
    def dtype(self) -> str:
        """As safetensors spells it, in capitals."""
        return str(self.source.info(self.name).dtype).upper()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, row-major."""
        return tuple(self.source.info(self.name).shape)

    def read(self) -> npt.NDArray[Any]:
        """A view of the data."""
        array = self.source.tensor(self.name)
        if array.shape != self.shape:
            raise WeightsError(f"{self.name} was read as {list(array.shape)}, expected {list(self.shape)}")
        return array

    def check(self, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        """The same.

        Raises:
            WeightsError: its dtype is none of these, or its shape another one.
        """
        if self.dtype not in dtypes:
            raise WeightsError(f"{self.name} has dtype {self.dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and self.shape != shape:
            raise WeightsError(f"{self.name} is {list(self.shape)}, expected {list(shape)}")
        return self


Tensors = Mapping[str, Tensor]
"""Of one module: the end of the name ("weight_packed", "qzeros") -> the tensor."""


class Matrix(Protocol):
    """A matrix [n, k]; its shapes and dtypes are checked, its values are when they are read."""

    @property
    def kind(self) -> Literal["grouped", "fp8", "f32"]:
        """What its rows are."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, k]."""
        ...

    def rows(self, part: Rows) -> QuantisedRows | F32Array:
        """Some of its rows, in the order of the slice; f32 [rows, k] of kind "f32".

        Raises:
            WeightsError: a scale or a code is no number.
        """
        ...


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """A matrix of integers: weight[r, c] = (codes[r, c] - zeros[r, c // group]) * scales[r, c // group].

    Args:
        name: for errors.
        shape: [n, k].
        bits: 2 to 8.
        group: columns that share a scale.
        codes: of rows, [rows, k] below 2^bits.
        scales: of rows, [rows, ceil(k / group)].
        zeros: of rows, integers [rows, ceil(k / group)]; None: 2^(bits - 1).
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    codes: Callable[[Rows], U8Array]
    scales: Callable[[Rows], F32Array]
    zeros: Callable[[Rows], npt.NDArray[Any] | None] | None = None
    kind: Literal["grouped"] = "grouped"

    def rows(self, part: Rows) -> GroupedRows:
        """Some of its rows, their codes in 4 or 8 bits."""
        scales = _finite(self.name, part, self.scales(part))
        zeros = None if self.zeros is None else self.zeros(part)
        codes, bits = self.codes(part), 4 if self.bits <= 4 else 8
        if zeros is None:
            # The middle of the wider range, so that these stay symmetric.
            shift = (1 << bits - 1) - (1 << self.bits - 1)
            return GroupedRows(codes + np.uint8(shift) if shift else codes, bits, self.group, scales)
        return GroupedRows(codes, bits, self.group, scales, -zeros.astype(np.float32) * scales)


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix of FP8: weight[r, c] = E4M3[codes[r, c]] * scales[r, c // group]; fields as of `IntegerMatrix`."""

    name: str
    shape: tuple[int, int]
    group: int
    codes: Callable[[Rows], U8Array]
    scales: Callable[[Rows], F32Array]
    kind: Literal["fp8"] = "fp8"

    def rows(self, part: Rows) -> Fp8Rows:
        """Some of its rows."""
        codes = self.codes(part)
        if (codes & 0x7F == 0x7F).any():
            raise WeightsError(f"{self.name} holds a NaN; make the checkpoint again")
        return Fp8Rows(codes, self.group, _finite(self.name, part, self.scales(part)))


class ByGroup(NamedTuple):
    """A matrix whose columns stand by the groups that share a scale, not as the checkpoint has them.

    Args:
        matrix: with those columns.
        order: intp [k]: which of the checkpoint's each of them is.
    """

    matrix: IntegerMatrix
    order: npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix that no packed form has, as its columns stand: its weights as f32.

    Args:
        name: for errors.
        shape: [n, k].
        values: of rows, f32 [rows, k].
        by_group: the same in few bits, where another order of columns makes that possible.
    """

    name: str
    shape: tuple[int, int]
    values: Callable[[Rows], F32Array]
    by_group: ByGroup | None = None
    kind: Literal["f32"] = "f32"

    def rows(self, part: Rows) -> F32Array:
        """Some of its rows."""
        return _finite(self.name, part, self.values(part))


def _finite(name: str, part: Rows, scales: F32Array) -> F32Array:
    wrong = ~np.isfinite(scales).all(axis=1)
    if wrong.any():
        row = range(part.start, part.stop, part.step or 1)[int(wrong.argmax())]
        raise WeightsError(f"{name}: a scale of row {row} is no finite number; make the checkpoint again")
    return scales


def require(module: str, tensors: Tensors, *ends: str) -> tuple[Tensor, ...]:
    """Those tensors of a module.

    Raises:
        WeightsError: one is missing.
    """
    missing = [end for end in ends if end not in tensors]
    if missing:
        raise WeightsError(
            f"{module}.{missing[0]} is missing beside {next(iter(tensors.values())).name}; download the checkpoint again"
        )
    return tuple(tensors[end] for end in ends)


def unpack(words: npt.NDArray[Any], bits: int, n: int) -> U8Array:
    """Fields of a little-endian stream of bits along the last axis: int32 [..., ceil(n * bits / 32)] -> uint8 [..., n]."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream[..., :n]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = stream[..., None] >> shifts & np.uint8((1 << bits) - 1)
        return fields.reshape(*stream.shape[:-1], -1)[..., :n]
    single = np.unpackbits(stream, axis=-1, count=n * bits, bitorder="little")
    return np.packbits(single.reshape(*stream.shape[:-1], n, bits), axis=-1, bitorder="little")[..., 0]


def floats(array: npt.NDArray[Any], dtype: str) -> F32Array:
    """A tensor of one of `FLOATS` as float32, exactly; an E8M0 of 255 is NaN."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E8M0":
        return np.where(
            array == 255, np.float32(np.nan), np.ldexp(np.float32(1), array.astype(np.int32) - 127)
        )
    return array.astype(np.float32)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """That of a tensor [n, k]."""
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise WeightsError(f"{weight.name} is {list(weight.shape)}, expected [rows, columns]")
    return weight.shape[0], weight.shape[1]


def spread_scales(
    tensor: Tensor, shape: tuple[int, int], block: Block | None
) -> tuple[int, Callable[[Rows], F32Array]]:
    """How a matrix's scales come to its rows.

    Args:
        tensor: [ceil(n / rows), ceil(k / columns)] of such blocks, also without dimensions of 1.
        shape: [n, k].
        block: (rows, columns) that share a scale, None: all of them; None: one for all, or one a row, as its shape is.

    Returns:
        The columns that share one, and what gives the scales of rows, f32 [rows, ceil(k / columns)].

    Raises:
        WeightsError: dtype or shape are others.
    """
    if block is None:
        block = (None, None) if math.prod(tensor.shape) == 1 else (1, None)
    rows, columns = (size if at is None else at for size, at in zip(shape, block, strict=True))
    expected = (-(-shape[0] // rows), -(-shape[1] // columns))
    if [size for size in tensor.shape if size != 1] != [size for size in expected if size != 1]:
        raise WeightsError(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected)}")
    tensor.check(_FLOATS)

    def read(part: Rows) -> F32Array:
        at = np.arange(part.start, part.stop, part.step) // rows
        return floats(tensor.read().reshape(expected)[at], tensor.dtype)

    return min(columns, shape[1]), read


def by_group(matrix: Matrix | None) -> ByGroup | None:
    """The matrix with its columns by group; None: it stands so in the checkpoint, or can't."""
    return matrix.by_group if isinstance(matrix, DenseMatrix) else None


def ordered(matrix: IntegerMatrix, groups: Tensor | None) -> IntegerMatrix | DenseMatrix:
    """The matrix, whose columns belong to the groups that `groups` [k] names, where there is such a tensor; -1 everywhere
    is what compressed-tensors begins with, and names none.

    Raises:
        WeightsError: not one of the groups for each column.
    """
    if groups is None:
        return matrix
    k = matrix.shape[1]
    columns = groups.check(("I32", "I64"), (k,)).read().astype(np.intp)
    side_by_side = np.arange(k) // matrix.group
    if (columns == side_by_side).all() or (columns == -1).all():
        return matrix
    if columns.min() < 0 or columns.max() > side_by_side[-1]:
        raise WeightsError(
            f"{groups.name} holds {columns.min()} to {columns.max()}, expected groups from 0 to {side_by_side[-1]}"
        )

    def values(part: Rows) -> F32Array:
        zeros = None if matrix.zeros is None else matrix.zeros(part)
        middle = np.float32(1 << matrix.bits - 1)
        zero = middle if zeros is None else zeros.astype(np.float32)[:, columns]
        return (matrix.codes(part) - zero) * matrix.scales(part)[:, columns]

    order = np.argsort(columns, kind="stable")
    sorted_ = replace(matrix, codes=lambda part: np.take(matrix.codes(part), order, axis=1))
    of_one_size = (columns[order] == side_by_side).all()
    return DenseMatrix(matrix.name, matrix.shape, values, ByGroup(sorted_, order) if of_one_size else None)

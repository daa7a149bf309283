"""Weights that a plan runs on: packed into panels, or read where their file is mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from pace._ext import _kernels
from pace.errors import CheckpointError
from pace.models.plan import F32Array as F32
from pace.models.weight_formats import FORMATS, int8_group
from pace.ops.team import Team

PACKED_LAYOUTS: Final[str] = _kernels.LAYOUTS
"""What the bytes of packed matrices mean: of every tier the same, and another name when that changes."""

_LAYOUTS: Final = {"bf16": 0, "mxfp4": 1, "int8": 2, "int4": 3, "fp8": 4}
_F32, _BF16, _F16 = range(3)  # types of scales
_SYMMETRIC, _ZEROS, _OFFSETS = range(3)
_DTYPES: Final = {"bf16": (0, np.uint16), "f16": (1, np.float16), "f32": (2, np.float32)}
_MODES: Final = {"rows": 0, "gate": 1, "up": 2}


class Codes(Protocol):
    """Rows of a quantised matrix, as `pace.quant.groups` has them: GroupedRows."""

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """[rows, k]."""
        ...

    @property
    def bits(self) -> int:
        """4 or 8."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        ...

    @property
    def scales(self) -> F32:
        """[rows, ceil(k / group)]."""
        ...

    @property
    def offsets(self) -> F32 | None:
        """As many, or None: -2^(bits - 1) * scale."""
        ...


class Floats(Protocol):
    """Rows of a matrix of FP8, as `pace.quant.groups` has them: Fp8Rows."""

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """[rows, k], E4M3."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        ...

    @property
    def scales(self) -> F32:
        """[rows, ceil(k / group)]."""
        ...


class PackedMatrix:
    """A weight [n, k] in panels, laid out as the kernels read it; filled part by part, zeros elsewhere.

    Args:
        count: how many matrices of this shape: the experts of a layer.
        format: "bf16"; "mxfp4": 4.25 bits a weight, k a multiple of 32; "int8", "int4", "fp8": a code for each weight, a
            scale for each row, or with "g32" and the like behind for so many columns of it. Scales, and what is added to
            a group, take 16 bits where all are such numbers, else 32: the rows decide.

    Raises:
        ValueError: a size is not positive, or k or the format is none of those.
        MemoryError: the system refuses the memory.
    """

    _team: Team | None = None
    """Who packs; None: a file has it."""
    _packed: _kernels.Packed | None = None

    def __init__(self, team: Team, n: int, k: int, count: int = 1, format: str = "bf16") -> None:
        self._describe(n, k, count, format)
        self._team = team
        if format in ("bf16", "mxfp4") or min(n, k, count) < 1:
            self._packed = self._make(_F32, _SYMMETRIC)

    def _describe(self, n: int, k: int, count: int, format: str) -> None:
        if format not in FORMATS:
            raise ValueError(f"weight format is {format!r}, expected one of {', '.join(FORMATS)}")
        self.n = n
        self.k = k
        self.count = count
        self.format = format
        self.bits = 4 if format.startswith("int4") else 8
        kind, _, group = format.partition("g")
        self._layout, self._group = _LAYOUTS[kind], int(group or 0)

    def _make(self, scales: int, zeros: int, source: npt.NDArray[np.uint8] | None = None) -> _kernels.Packed:
        return _kernels.Packed(self.n, self.k, self.count, self._layout, self._group, scales, zeros, source)

    @classmethod
    def mapped(
        cls,
        n: int,
        k: int,
        count: int,
        format: str,
        kind: tuple[int, int],
        source: npt.NDArray[np.uint8],
    ) -> PackedMatrix:
        """A matrix whose bytes a file has: `data` of another of this shape, format and kind; only read, never copied.

        Args:
            kind: of the other.
            source: uint8 [bytes], C-contiguous. It is kept.

        Raises:
            ValueError: there is no such matrix, or it has another number of bytes.
        """
        matrix = cls.__new__(cls)
        matrix._describe(n, k, count, format)
        matrix._packed = matrix._make(*kind, source)
        return matrix

    @property
    def _workers(self) -> _kernels.Team:
        if self._team is None:
            raise ValueError("rows for a packed matrix that a file has")
        return self._team._team

    @property
    def kind(self) -> tuple[int, int]:
        """Types of scales and of zeros, as `enum pace_scales` and `pace_zeros` have them."""
        return self._matrix.kind

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The packed bytes [nbytes], read-only, for as long as nothing more is packed."""
        return np.frombuffer(memoryview(self._matrix), np.uint8)

    @property
    def _matrix(self) -> _kernels.Packed:
        """The memory; of a format with groups it is there when the first rows have said what their scales are."""
        if self._packed is None:
            self._packed = self._make(_F32, _SYMMETRIC)
        return self._packed

    @property
    def int8_group(self) -> int | None:
        """Columns that share a scale in int8 rows which this can be multiplied by; 0: any; None: there are none."""
        return int8_group(self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy, padding included."""
        return self._matrix.nbytes

    def pack(
        self, src: npt.NDArray[Any], dtype: str, at: int = 0, mode: str = "rows", matrix: int = 0
    ) -> None:
        """Convert rows to bf16 and place them; in a matrix of int8, int4 or FP8 round them to the nearest, the scale of a
        group of int4 being that with the least square error.

        Args:
            src: [rows, k]; uint16 for "bf16", float16 for "f16", float32 for "f32".
            at: first packed row, a multiple of 16.
            mode: "rows", or "gate" / "up": alternate blocks of 16 rows (see `models.plan.gated_rows`).
            matrix: which of `count`.

        Raises:
            ValueError: the rows do not fit, or there is no such matrix.
            CheckpointError: the rows are of a mapped file that was truncated, or that its disk no longer gives; a weight
                that is to be quantised is no finite number.
        """
        code, np_dtype = _DTYPES[dtype]
        if src.dtype != np_dtype or src.ndim != 2 or not src.flags.c_contiguous:
            raise ValueError(
                f"source is {src.dtype} {src.shape}, expected C-contiguous {np_dtype.__name__} [rows, {self.k}]"
            )
        if self._packed is None:
            self._packed = self._make(_BF16 if 0 < self._group < self.k else _F32, _SYMMETRIC)
        elif self._packed.kind[0] == _F16:
            self._packed.recast(_F32, self._packed.kind[1])
        with _checkpoint_errors():
            self._matrix.pack(self._workers, src.view(np.uint8), code, at, _MODES[mode], matrix)

    def pack_mxfp4(
        self,
        blocks: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        at: int = 0,
        mode: str = "rows",
        matrix: int = 0,
    ) -> None:
        """Place rows of MXFP4; no value changes but those below 2^-126, which become 0 as in every product.

        Args:
            blocks: [rows, k / 32, 16] or [rows, k / 2]: two codes a byte, that of the lower k in the low nibble.
            scales: [rows, k / 32], bytes e of 2^(e - 127). Both may be every other row of a checkpoint's tensor: bytes of
                a row stand side by side, rows may not.
            at, mode, matrix: as of `pack`.

        Raises:
            ValueError: shapes or strides are not those, or the rows do not fit.
            CheckpointError: a scale of 255 (NaN), a weight of 2^128 or more; or as of `pack`.
        """
        if blocks.ndim == 3 and blocks.shape[2] == 16 and (blocks.shape[1] == 1 or blocks.strides[1] == 16):
            # A view, whatever the stride from row to row.
            blocks = np.lib.stride_tricks.as_strided(
                blocks, (len(blocks), blocks.shape[1] * 16), (blocks.strides[0], blocks.strides[2])
            )
        for name, array in (("blocks", blocks), ("scales", scales)):
            if array.dtype != np.uint8 or array.ndim != 2:
                raise ValueError(
                    f"{name} are {array.dtype} {array.shape}, expected uint8 [rows, {self.k} / 2 or / 32]"
                )
        with _checkpoint_errors():
            self._matrix.pack_mxfp4(self._workers, blocks, scales, at, _MODES[mode], matrix)

    def pack_groups(self, rows: Codes, at: int = 0, mode: str = "rows", matrix: int = 0) -> None:
        """Place rows of integers, exactly: a weight is codes[r, c] * scales[r, c // group] + offsets[r, c // group].

        Args:
            rows: of this matrix' bits and group, or fewer bits and longer groups.
            at, mode, matrix: as of `pack`.

        Raises:
            ValueError: shapes, dtypes, bits or groups are not those, or the rows do not fit.
            CheckpointError: a scale or an offset that is no finite number, a code beyond its bits; or as of `pack`.
        """
        codes, offsets = rows.codes, rows.offsets
        if self._layout not in (_LAYOUTS["int8"], _LAYOUTS["int4"]) or rows.bits > self.bits:
            raise ValueError(f"rows of {rows.bits}-bit integers for a matrix of {self.format}")
        scales = self._per_group(codes, rows.scales, rows.group, "scales")
        zeros = _SYMMETRIC
        stored = np.empty((len(codes), 0), np.int16)
        if offsets is not None:
            offsets = self._per_group(codes, offsets, rows.group, "offsets")
            zero = _zeros_of(scales, offsets)
            zeros, stored = (_OFFSETS, stored) if zero is None else (_ZEROS, zero)
        elif rows.bits < self.bits:
            codes = codes + np.uint8(128 - 8)
        type_, held = self._settle(scales, zeros)
        if held == _ZEROS and zeros == _SYMMETRIC:
            stored = np.full(scales.shape, 1 << (self.bits - 1), np.int16)
        if held == _OFFSETS:
            middle = np.float32(1 << (self.bits - 1))
            whole = -middle * scales if offsets is None else offsets
            stored = np.ascontiguousarray(whole, np.float32)
        self._place(codes, _as_type(scales, type_), stored, at, mode, matrix)

    def pack_fp8(self, rows: Floats, at: int = 0, mode: str = "rows", matrix: int = 0) -> None:
        """Place rows of FP8 E4M3, exactly: a weight is the number of codes[r, c] times scales[r, c // group].

        Args:
            rows: of this matrix' group, or longer ones.
            at, mode, matrix: as of `pack`.

        Raises:
            ValueError: shapes, dtypes or groups are not those, or the rows do not fit.
            CheckpointError: a scale that is no finite number, a code of NaN; or as of `pack`.
        """
        if self._layout != _LAYOUTS["fp8"]:
            raise ValueError(f"rows of FP8 for a matrix of {self.format}")
        scales = self._per_group(rows.codes, rows.scales, rows.group, "scales")
        type_, _ = self._settle(scales, _SYMMETRIC)
        self._place(
            rows.codes, _as_type(scales, type_), np.empty((len(scales), 0), np.int16), at, mode, matrix
        )

    def _per_group(self, codes: npt.NDArray[np.uint8], values: F32, group: int, what: str) -> F32:
        """Scales or offsets of rows [rows, groups of theirs] as [rows, groups of this matrix]."""
        own = self._group or self.k
        whole = group >= self.k
        groups = 1 if whole else -(-self.k // group)
        if codes.dtype != np.uint8 or codes.ndim != 2 or values.dtype != np.float32:
            raise ValueError(
                f"codes are {codes.dtype} {list(codes.shape)}, {what} {values.dtype}; expected uint8 [rows, {self.k}] and "
                "float32"
            )
        if values.shape != (len(codes), groups) or codes.shape[1] != self.k:
            raise ValueError(
                f"codes are {list(codes.shape)} with {what} {list(values.shape)}, expected [rows, {self.k}] and [rows, "
                f"{groups}]"
            )
        if not whole and (own > group or group % own):
            raise ValueError(f"{what} for groups of {group} columns, the matrix has groups of {own}")
        count = -(-self.k // own)
        repeat = count if whole else group // own
        return values if repeat == 1 else np.repeat(values, repeat, axis=1)[:, :count]

    def _settle(self, scales: F32, zeros: int) -> tuple[int, int]:
        """Types of scales and zeros that hold these and all before: the matrix is made, or made wider."""
        row = not self._group or self._group >= self.k
        types = {_F32} if row or zeros == _OFFSETS else _types_of(scales)
        if self._packed is None:
            self._packed = self._make(min(types - {_F32}, default=_F32), zeros)
            return self._packed.kind
        held, had = self._packed.kind
        wanted = held if held in types else _F32
        if wanted != held or zeros > had:
            self._packed.recast(wanted, max(zeros, had))
        return self._packed.kind

    def _place(
        self,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[Any],
        zeros: npt.NDArray[Any],
        at: int,
        mode: str,
        matrix: int,
    ) -> None:
        rows = len(codes)
        if not rows:
            raise ValueError("no rows")
        if codes.strides[1] != 1 or codes.strides[0] < codes.shape[1]:
            codes = np.ascontiguousarray(codes)
        held, less = (np.ascontiguousarray(part).view(np.uint8).reshape(rows, -1) for part in (scales, zeros))
        with _checkpoint_errors():
            self._matrix.pack_groups(self._workers, codes, held, less, at, _MODES[mode], matrix)

    def unpack(self, matrix: int = 0, rows: npt.NDArray[np.int32] | None = None) -> F32:
        """A matrix as f32 [n, k], or some rows of it [len(rows), k].

        Raises:
            ValueError: there is no such matrix or row.
        """
        return self._matrix.unpack(matrix, rows)


def _types_of(scales: F32) -> set[int]:
    """The types of scales that hold all of these exactly."""
    types = {_F32}
    if not (scales.view(np.uint32) & 0xFFFF).any():
        types.add(_BF16)
    with np.errstate(over="ignore"):
        if np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
            types.add(_F16)
    return types


def _as_type(scales: F32, type_: int) -> npt.NDArray[Any]:
    if type_ == _BF16:
        return (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype(np.uint16)
    return scales.astype(np.float16) if type_ == _F16 else scales


def _zeros_of(scales: F32, offsets: F32) -> npt.NDArray[np.int16] | None:
    """The integers 0 .. 256 of which offsets = -zero * scale, if they are such."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        zeros = np.rint(np.where(scales == 0, 0, -offsets / scales))
        exact = -zeros.astype(np.float64) * scales  # a product that was rounded is an offset of its own
        if not ((zeros >= 0) & (zeros <= 256)).all() or not np.array_equal(exact, offsets):
            return None
    return zeros.astype(np.int16)


def quantise_rows(
    src: npt.NDArray[Any], dtype: str, format: str, group: int
) -> tuple[npt.NDArray[np.uint8], F32]:
    """Round rows as `PackedMatrix.pack` rounds them, without packing; on the calling thread, without the GIL.

    Args:
        src: [rows, k], as of `PackedMatrix.pack`; a multiple of 4 bytes apart.
        format: "int8", "int4" or "fp8".
        group: columns that share a scale; k or more: all.

    Returns:
        Codes uint8 [rows, k], integers with 2^(bits - 1) added, and scales of 16 bits as f32 [rows, ceil(k / group)].

    Raises:
        ValueError: another dtype, layout or format.
        CheckpointError: a weight is no finite number.
    """
    code, np_dtype = _DTYPES[dtype]
    if src.dtype != np_dtype or src.ndim != 2 or not src.flags.c_contiguous:
        raise ValueError(
            f"source is {src.dtype} {src.shape}, expected C-contiguous {np_dtype.__name__} [rows, columns]"
        )
    codes, bits = _kernels.quantise_rows(src.view(np.uint8), code, src.shape[1], _LAYOUTS[format], group)
    scales = (bits.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(scales).all():
        row = int((~np.isfinite(scales)).any(axis=1).argmax())
        raise CheckpointError(f"row {row} holds a weight that is no finite number; make the checkpoint again")
    return codes, scales


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    """Say what is wrong with a checkpoint where packing its rows found out."""
    try:
        yield
    except _kernels.Truncated as error:
        raise CheckpointError(f"{error}; copy the checkpoint again, and load it when that is done") from None
    except _kernels.Unrepresentable as error:
        raise CheckpointError(f"{error}; make the checkpoint again") from None


class MappedTable:
    """A table [n, k] whose rows are read where they stand, in memory mapped from a file for instance; nothing is copied.

    Args:
        rows: [n, k], C-contiguous; uint16 for "bf16", float16 for "f16", float32 for "f32". It is kept.

    Raises:
        ValueError: another dtype or layout, or no elements.
    """

    def __init__(self, rows: npt.NDArray[Any], dtype: str) -> None:
        code, np_dtype = _DTYPES[dtype]
        if rows.dtype != np_dtype or rows.ndim != 2 or not rows.flags.c_contiguous:
            raise ValueError(
                f"table is {rows.dtype} {rows.shape}, expected C-contiguous {np_dtype.__name__} [rows, columns]"
            )
        self._matrix = _kernels.Mapped(rows.view(np.uint8), code)
        self.n, self.k = rows.shape
        self.rows = rows
        self.dtype = dtype

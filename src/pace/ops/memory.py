"""What a plan runs on: packed and mapped weights, and the memory of KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pace._ext import _kernels
from pace.errors import CheckpointError, ConfigError
from pace.models.plan import F32Array as F32
from pace.ops.team import Team

KV_DTYPES: Final = ("bf16", "int8")
"""Element types of the KV cache."""

WEIGHT_FORMATS: Final = ("bf16", "mxfp4", "int8")
"""What packed weights can be in memory; the order is the extension's."""

_DTYPES: Final = {"bf16": (0, np.uint16), "f16": (1, np.float16), "f32": (2, np.float32)}
_MODES: Final = {"rows": 0, "gate": 1, "up": 2}


class PackedMatrix:
    """A weight [n, k] in panels, laid out as the kernels read it; filled part by part, zeros elsewhere.

    Args:
        count: how many matrices of this shape: the experts of a layer.
        format: "bf16"; "mxfp4": 4.25 bits a weight, k a multiple of 32; "int8": an integer a weight, a scale a row.

    Raises:
        ValueError: a size is not positive, or k or the format is none of those.
        MemoryError: the system refuses the memory.
    """

    def __init__(self, team: Team, n: int, k: int, count: int = 1, format: str = "bf16") -> None:
        if format not in WEIGHT_FORMATS:
            raise ValueError(f"weight format is {format!r}, expected one of {', '.join(WEIGHT_FORMATS)}")
        self._team = team
        self._matrix = _kernels.Packed(n, k, count, WEIGHT_FORMATS.index(format))
        self.n = n
        self.k = k
        self.count = count
        self.format = format

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy, padding included."""
        return self._matrix.nbytes

    def pack(
        self, src: npt.NDArray[Any], dtype: str, at: int = 0, mode: str = "rows", matrix: int = 0
    ) -> None:
        """Convert rows to bf16 and place them.

        Args:
            src: [rows, k]; uint16 for "bf16", float16 for "f16", float32 for "f32".
            at: first packed row, a multiple of 16.
            mode: "rows", or "gate" / "up": alternate blocks of 16 rows (see `models.plan.gated_rows`).
            matrix: which of `count`.

        Raises:
            ValueError: the rows do not fit, or there is no such matrix.
            CheckpointError: the rows are of a mapped file that was truncated, or that its disk no longer gives.
        """
        code, np_dtype = _DTYPES[dtype]
        if src.dtype != np_dtype or src.ndim != 2 or not src.flags.c_contiguous:
            raise ValueError(
                f"source is {src.dtype} {src.shape}, expected C-contiguous {np_dtype.__name__} [rows, {self.k}]"
            )
        with _checkpoint_errors():
            self._matrix.pack(self._team._team, src.view(np.uint8), code, at, _MODES[mode], matrix)

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
            self._matrix.pack_mxfp4(self._team._team, blocks, scales, at, _MODES[mode], matrix)

    def pack_int8(
        self,
        codes: npt.NDArray[np.int8],
        scales: F32,
        at: int = 0,
        mode: str = "rows",
        matrix: int = 0,
    ) -> None:
        """Place rows of int8; a weight is codes[i, j] * scales[i].

        Args:
            codes: int8 [rows, k], -128 included.
            scales: f32 [rows].
            at, mode, matrix: as of `pack`.

        Raises:
            ValueError: shapes or dtypes are not those, or the rows do not fit.
            CheckpointError: a scale is NaN or infinite; or as of `pack`.
        """
        if codes.dtype != np.int8 or codes.ndim != 2 or scales.dtype != np.float32 or scales.ndim != 1:
            raise ValueError(
                f"codes are {codes.dtype} {codes.shape}, scales {scales.dtype} {scales.shape}; expected int8 "
                f"[rows, {self.k}] and float32 [rows]"
            )
        with _checkpoint_errors():
            self._matrix.pack_int8(self._team._team, codes, scales, at, _MODES[mode], matrix)

    def unpack(self, matrix: int = 0) -> F32:
        """A matrix as f32 [n, k]."""
        return self._matrix.unpack(matrix)


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


class KVPool:
    """KV cache memory of a group of layers: n_blocks blocks of block_size tokens, keys and values.

    Args:
        head_dim: a multiple of 16 up to 512.
        block_size: tokens in a block, a power of two from 16 on.
        dtype: "bf16", or "int8": per token and kv head one float32 scale for the key and one for the value
            (largest magnitude / 127); a block takes n_layers * n_kv_heads * block_size * (2 * head_dim + 8) bytes.
        contiguous: a sequence's blocks follow each other, and its block table is [S, 1], the first of them.

    Raises:
        ConfigError: a size or dtype is not one of those.
        MemoryError: the system refuses the memory.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        n_blocks: int,
        block_size: int,
        dtype: str = "bf16",
        contiguous: bool = False,
    ) -> None:
        if dtype not in KV_DTYPES:
            raise ConfigError(f"KV cache dtype is {dtype!r}, expected bf16 or int8")
        try:
            self._pool = _kernels.KVPool(
                n_layers, n_kv_heads, head_dim, n_blocks, block_size, dtype == "int8", contiguous
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.n_layers = n_layers
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.contiguous = contiguous

    @property
    def nbytes(self) -> int:
        """Bytes reserved; pages are touched only when tokens are stored, or soon will be: see `n_mapped`."""
        return self._pool.nbytes

    @property
    def n_mapped(self) -> int:
        """Leading blocks that steps have used or prepared: each step maps the pages of one more block than it uses, while
        there are fewer than one ahead per sequence."""
        return self._pool.n_mapped

    def copy(self, src: int, dst: int, n_tokens: int) -> None:
        """Make the first `n_tokens` tokens of block `src` those of block `dst`, in every layer; appending goes on
        behind them. Runs without the GIL. No step that touches either block may run meanwhile.

        Args:
            src, dst: two different blocks.
            n_tokens: 0 to block_size.

        Raises:
            ValueError: a block or the count is out of range; nothing was copied.
        """
        self._pool.copy(src, dst, n_tokens)

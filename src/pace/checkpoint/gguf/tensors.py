"""The tensors of a GGUF file, as the checkpoint on the hub has them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pace.checkpoint.gguf.header import GgufFile, GgufTensor
from pace.checkpoint.gguf.names import CONSUMED, View, views
from pace.checkpoint.safetensors import TensorInfo
from pace.errors import CheckpointError, UnsupportedModel, show
from pace.quant.gguf_blocks import BLOCKS, grouped
from pace.quant.groups import GroupedRows

__all__ = ["GgufMatrix", "GgufTensors"]

PLAIN: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Types of which a value is a number; bf16 as its bits."""


class GgufTensors:
    """The same names, shapes and values as those of `checkpoint.safetensors.Checkpoint`.

    What the converter changed is undone when a tensor is read: such a one is a copy, the others are read-only views of the
    mapped file, which stay valid after `close`.

    Args:
        files: of one model, in order.
        n_heads, n_kv_heads: of queries, and of keys and values; for architecture llama.

    Attributes:
        matrices: those that are stored as blocks of small integers, by their names.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
        UnsupportedModel: values are stored in a way that pace doesn't read.
    """

    def __init__(
        self, files: Sequence[GgufFile], architecture: str, n_heads: object, n_kv_heads: object
    ) -> None:
        self._maps = {file.path: file.data for file in files}
        self._path = files[0].path
        self._heads = {".q_proj.": n_heads, ".k_proj.": n_kv_heads}
        self._views: dict[str, View] = {}
        self.matrices: dict[str, GgufMatrix] = {}
        for file in files:
            for tensor in file.tensors:
                if tensor.name not in CONSUMED:
                    self._add(tensor, architecture)

    def _add(self, tensor: GgufTensor, architecture: str) -> None:
        for name, view in views(tensor, architecture):
            blocks = tensor.type.name in BLOCKS and len(self._shape(view)) == 2 and view.change != "plus one"
            if not blocks and view.change not in ("blocks", "scales") and tensor.type.name not in PLAIN:
                raise UnsupportedModel(
                    f"{tensor.file}: {show(tensor.name)} is stored as {tensor.type.name}; matrices are read in "
                    f"{', '.join([*PLAIN, *BLOCKS])}, experts in MXFP4 too, the rest in {', '.join(PLAIN)}"
                )
            if name in self._views:
                raise CheckpointError(f"{tensor.file}: holds {show(tensor.name)}, as an earlier file does")
            self._views[name] = view
            if blocks:
                self.matrices[name] = GgufMatrix(self, name)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._views)

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor without touching its data; MXFP4 as bytes, codes [n, k / 32, 16] and scales [n, k / 32].

        Raises:
            CheckpointError: there is no such tensor.
        """
        view = self._view(name)
        tensor = view.tensor
        shape = self._shape(view)
        offset = tensor.offset + self._n_bytes(view) * (view.expert or 0)
        if view.change in ("blocks", "scales"):
            blocks = (*shape[:-1], shape[-1] // 32)
            shape, dtype = ((*blocks, 16) if view.change == "blocks" else blocks), "U8"
        else:
            dtype = "F32" if view.change == "plus one" else tensor.type.name
        return TensorInfo(name, dtype, shape, tensor.file, offset, self._n_bytes(view))

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a C-contiguous array; BF16 as uint16, blocks as their bytes [n, bytes of a row].

        Raises:
            CheckpointError: there is no such tensor, the file is closed or shorter than it was.
        """
        view, info = self._view(name), self.info(name)
        mapped = self._maps.get(info.file)
        if mapped is None:
            raise CheckpointError(f"{info.file}: the file is closed")
        if mapped.size() < len(mapped):
            raise CheckpointError(
                f"{info.file}: {mapped.size()} bytes, it had {len(mapped)} when it was opened"
            )
        raw = np.frombuffer(mapped, np.uint8, info.n_bytes, info.offset)
        if view.change in ("blocks", "scales"):
            blocks = raw.reshape(*info.shape[:2], 17)
            return blocks[..., 0].copy() if view.change == "scales" else _neighbours(blocks[..., 1:])
        if name in self.matrices:
            return raw.reshape(info.shape[0], -1)
        dtype = PLAIN[view.tensor.type.name]
        if info.offset % dtype.itemsize:  # an alignment below the usual 32
            raw = raw.copy()
        array = raw.view(dtype).reshape(info.shape)
        if view.change == "plus one":
            return _as_f32(array, view.tensor.type.name) - np.float32(1.0)
        order = self.order(name)
        return array if order is None else array[order]

    def drop(self, name: str) -> None:
        """Give a tensor's pages back to the system; reading it again reads the file again."""
        info = self.info(name)
        mapped = self._maps.get(info.file)
        if mapped is not None and info.n_bytes:
            start = info.offset - info.offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, info.offset + info.n_bytes - start)

    def close(self) -> None:
        """Unmap the files; those that arrays still refer to are unmapped with the last of them."""
        for mapped in self._maps.values():
            with suppress(BufferError):  # an array still refers to it, and keeps it alive
                mapped.close()
        self._maps.clear()

    def _view(self, name: str) -> View:
        try:
            return self._views[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: no tensor {show(name)}") from None

    @staticmethod
    def _n_bytes(view: View) -> int:
        return view.tensor.n_bytes if view.expert is None else view.tensor.n_bytes // view.tensor.shape[0]

    @staticmethod
    def _shape(view: View) -> tuple[int, ...]:
        return view.tensor.shape if view.expert is None else view.tensor.shape[1:]

    def order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Where the file has each row of a tensor, [n]; None: in their places."""
        view = self._view(name)
        if view.change != "pairs":
            return None
        n = view.tensor.shape[0]
        n_heads = next(heads for part, heads in self._heads.items() if part in name)
        if type(n_heads) is not int or n_heads < 1 or n % (2 * n_heads):
            raise CheckpointError(f"{self._path}: {name} has {n} rows, which are not {show(n_heads)} heads")
        # Of each head the pairs are neighbours; the original has the first of all pairs first.
        return np.arange(n).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(n)


class GgufMatrix:
    """A matrix [n, k] that is stored as blocks of small integers.

    Attributes:
        kind: what its rows are.
        shape: [n, k].
    """

    kind: Literal["grouped"] = "grouped"

    def __init__(self, tensors: GgufTensors, name: str) -> None:
        self._tensors = tensors
        self._name = name
        self._type = tensors.info(name).dtype
        self.shape = tensors.info(name).shape

    def rows(self, part: slice) -> GroupedRows:
        """Some of its rows, in the order of the slice.

        Raises:
            CheckpointError: a scale is no finite number; or as `GgufTensors.tensor`.
        """
        data, order = self._tensors.tensor(self._name), self._tensors.order(self._name)
        rows = grouped(self._type, np.ascontiguousarray(data[part] if order is None else data[order[part]]))
        offsets = rows.scales if rows.offsets is None else rows.offsets
        if not (np.isfinite(rows.scales).all() and np.isfinite(offsets).all()):
            raise CheckpointError(
                f"{self._name} has a scale that is no finite number; download the file again"
            )
        return rows


def _as_f32(array: npt.NDArray[Any], kind: str) -> npt.NDArray[np.float32]:
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array.astype(np.float32)


def _neighbours(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """MXFP4 codes [n, blocks, 16] whose byte j holds columns j and j + 16, with columns 2 j and 2 j + 1 instead."""
    columns = np.concatenate((codes & 15, codes >> 4), axis=-1)
    joined: npt.NDArray[np.uint8] = columns[..., 0::2] | columns[..., 1::2] << 4
    return joined


def read_vector(files: Sequence[GgufFile], name: str) -> npt.NDArray[np.float32] | None:
    """A vector of the files, f32 [n]; None where there is none."""
    for file in files:
        for tensor in file.tensors:
            if tensor.name == name and tensor.type.name == "F32":
                return np.frombuffer(file.data[tensor.offset : tensor.offset + tensor.n_bytes], np.float32)
    return None

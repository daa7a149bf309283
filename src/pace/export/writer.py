"""A checkpoint that is written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Described", "ShardWriter"]

_SIZES: Final = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "I64": 8}


class Described(NamedTuple):
    """A tensor that will be written.

    Args:
        name, dtype, shape: as the header has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * _SIZES[self.dtype]


class ShardWriter:
    """Writes the tensors of a checkpoint in their order, in as many files as it takes.

    Args:
        folder: that they go to.
        tensors: all of them.
        shard_bytes: a file has at most so many, or one tensor.
    """

    def __init__(self, folder: Path, tensors: Sequence[Described], shard_bytes: int) -> None:
        self._folder = folder
        shards: list[list[Described]] = [[]]
        size = 0
        for tensor in tensors:
            if size and size + tensor.n_bytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.n_bytes
        self._shards = shards

    def names(self) -> list[str]:
        """Of the files."""
        n = len(self._shards)
        if n == 1:
            return ["model.safetensors"]
        return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]

    def write(self, pieces: Iterator[tuple[str, npt.NDArray[Any]]]) -> None:
        """Write all tensors.

        Args:
            pieces: name and some data of each, those of one tensor in order; tensors of one module may take turns.
        """
        weight_map: dict[str, str] = {}
        where: dict[str, tuple[int, int]] = {}  # file descriptor, next byte
        files: list[BufferedWriter] = []
        try:
            for name, shard in zip(self.names(), self._shards, strict=True):
                file = (self._folder / name).open("wb")
                files.append(file)
                at = _write_header(file, shard)
                for tensor in shard:
                    weight_map[tensor.name] = name
                    where[tensor.name] = (file.fileno(), at)
                    at += tensor.n_bytes
                os.ftruncate(file.fileno(), at)
            for name, array in pieces:
                fd, at = where[name]
                data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, data[done:], at + done)
                where[name] = fd, at + done
            for opened in files:
                os.fsync(opened.fileno())
        finally:
            for opened in files:
                opened.close()
        if len(files) > 1:
            total = sum(tensor.n_bytes for shard in self._shards for tensor in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_header(file: BinaryIO, tensors: Sequence[Described]) -> int:
    """The header of a safetensors file; returns where its data begins."""
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.n_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.flush()
    return 8 + len(text)

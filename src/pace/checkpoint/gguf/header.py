"""Reads what a GGUF file says about itself: metadata and a list of tensors, checked completely.

The format (version 2 or 3, little-endian): "GGUF", version u32, counts of tensors and of metadata u64; metadata as key,
type u32, value; then each tensor's name, rank u32, sizes u64 (columns first), type u32 and offset u64; then, aligned, the
data. Strings are a length u64 and UTF-8. The PyPI package `gguf` makes several arrays of every string: 10.3 s for the
metadata of Llama 3 (128 k tokens, 280 k merges), and it believes counts and offsets.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from pace.checkpoint.config_json import open_regular
from pace.checkpoint.gguf.types import TYPES, GgmlType
from pace.errors import CheckpointError, show

__all__ = ["GgufFile", "GgufTensor", "read_header"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_TENSORS: Final = 100_000
MAX_KEYS: Final = 10_000
MAX_RANK: Final = 4
MAX_NAME_LEN: Final = 512
MAX_STRING: Final = 4 << 20
MAX_STRINGS: Final = 2_000_000  # in all lists together: a vocabulary of 262 k with its merges has 0.8 million
MAX_ALIGNMENT: Final = 1 << 16

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[Mapping[int, np.dtype[Any]]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Args:
        name: its name in the file.
        type: how its values are stored.
        shape: its sizes, slowest first.
        file: the file that holds it.
        offset: its first byte in the file.
        n_bytes: its size in bytes.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What one file says about itself.

    Args:
        path: of the file.
        metadata: key -> number, true or false, text, list of texts, or array of numbers.
        tensors: in the order of their data.
        data: the mapped file, read-only.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    data: mmap.mmap


def read_header(path: Path) -> GgufFile:
    """Map a file and read everything but the data.

    Raises:
        CheckpointError: it isn't a GGUF file, or anything about it is malformed, contradictory or over a limit.
    """
    file, size = open_regular(path)
    with file:
        if size < 24:
            raise CheckpointError(f"{path}: {size} bytes, too short for a GGUF file")
        try:
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
    try:
        return _Reader(path, data).read()
    except BaseException:
        data.close()
        raise


class _Reader:
    """Goes through the mapped header once."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self._strings = 0

    def read(self) -> GgufFile:
        if self._data[:4] != MAGIC:
            self._fail(f"starts with {show(self._data[:4])}, expected {show(MAGIC)}")
        self._at = 4
        version = self._u32()
        if version not in VERSIONS:
            big = "; it is a big-endian file" if version and not version & 0xFFFF else ""
            self._fail(f"GGUF version {version}, expected 2 or 3{big}; convert the model again")
        n_tensors = self._count(MAX_TENSORS, 24, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(MAX_KEYS, 13, "keys of metadata")):
            key = self._string(MAX_NAME_LEN)
            if key in metadata:
                self._fail(f"the key {show(key)} appears twice")
            metadata[key] = self._value(key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"general.alignment is {show(alignment)}, expected a power of two")
        entries = [self._tensor(alignment) for _ in range(n_tensors)]
        start = -(-self._at // alignment) * alignment
        return GgufFile(self._path, metadata, self._placed(entries, start), self._data)

    def _tensor(self, alignment: int) -> GgufTensor:
        name = self._string(MAX_NAME_LEN)
        rank = self._u32()
        if not 1 <= rank <= MAX_RANK:
            self._fail(f"{show(name)} has {rank} dimensions, expected 1 to {MAX_RANK}")
        shape = tuple(self._u64() for _ in range(rank))[::-1]
        code, offset = self._u32(), self._u64()
        kind = TYPES.get(code)
        if kind is None:
            self._fail(f"{show(name)} has the type {code}, which pace does not know")
        if not all(1 <= n <= self._size * 256 for n in shape) or shape[-1] % kind.values:
            self._fail(
                f"{show(name)} is {list(shape)}, which {kind.name} with blocks of {kind.values} can't be"
            )
        if offset % alignment:
            self._fail(f"{show(name)} is at {offset}, expected a multiple of {alignment}")
        n_bytes = math.prod(shape) // kind.values * kind.n_bytes
        return GgufTensor(name, kind, shape, self._path, offset, n_bytes)

    def _placed(self, entries: list[GgufTensor], start: int) -> list[GgufTensor]:
        """The tensors with their place in the file, in the order of their data."""
        names: set[str] = set()
        placed: list[GgufTensor] = []
        end = start
        for entry in sorted(entries, key=lambda entry: entry.offset):
            name, at = entry.name, start + entry.offset
            if name in names:
                self._fail(f"the tensor {show(name)} appears twice")
            if at < end:
                self._fail(f"{show(name)} overlaps the tensor before it (byte {at}, expected {end} or more)")
            end = at + entry.n_bytes
            if end > self._size:
                self._fail(f"{show(name)} ends at byte {end} of {self._size}; the file is truncated")
            names.add(name)
            placed.append(GgufTensor(name, entry.type, entry.shape, self._path, at, entry.n_bytes))
        return placed

    def _value(self, key: str) -> Any:
        kind = self._u32()
        if kind == _STRING:
            return self._string(MAX_STRING)
        if kind in _SCALARS:
            value = self._numbers(kind, 1)[0]
            if kind == 6:  # the shortest number that is this f32: 1e-05, not 9.999999747378752e-06
                return float(str(value))
            return bool(value) if kind == _BOOL else value.item()
        if kind != _ARRAY:
            self._fail(f"{show(key)} has the type {kind}, which pace does not know")
        kind = self._u32()
        if kind == _STRING:
            return self._texts(key)
        if kind not in _SCALARS:
            self._fail(f"{show(key)} is a list of the type {kind}, expected numbers or texts")
        return self._numbers(kind, self._u64())

    def _numbers(self, kind: int, count: int) -> Any:
        dtype = _SCALARS[kind]
        at = self._at
        if count > (self._size - at) // dtype.itemsize:
            self._fail(f"a list of {count} numbers at byte {at} of {self._size}; the file is truncated")
        self._at += count * dtype.itemsize
        # A copy: a view would keep the file mapped, and its offset is rarely a multiple of the item size.
        return np.frombuffer(self._data[at : self._at], dtype)

    def _texts(self, key: str) -> list[str]:
        count = self._count(MAX_STRINGS, 8, f"texts in {key}")
        self._strings += count
        if self._strings > MAX_STRINGS:
            self._fail(f"more than {MAX_STRINGS} texts in lists")
        data, size, at, unpack = self._data, self._size, self._at, _U64.unpack_from
        texts = []
        for _ in range(count):  # a method call per text would double the time
            if size - at < 8:
                self._fail(f"ends inside {key}; the file is truncated")
            (length,) = unpack(data, at)
            end = at + 8 + length
            if length > MAX_STRING or end > size:
                self._fail(
                    f"a text of {length} bytes in {key}, at byte {at} of {size}; the file is truncated or damaged"
                )
            texts.append(data[at + 8 : end])
            at = end
        self._at = at
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError:
            self._fail(f"{key} has a text that is not UTF-8")

    def _string(self, longest: int) -> str:
        at = self._at
        length = self._u64()
        if length > min(longest, self._size - self._at):
            self._fail(f"a text of {length} bytes at byte {at} of {self._size}, expected at most {longest}")
        self._at += length
        try:
            return self._data[at + 8 : self._at].decode()
        except UnicodeDecodeError:
            self._fail(f"a text at byte {at} is not UTF-8")

    def _count(self, most: int, least_bytes: int, what: str) -> int:
        """A number of things of which each has so many bytes at least."""
        count = self._u64()
        if count > min(most, (self._size - self._at) // least_bytes):
            self._fail(f"{count} {what} in a file of {self._size} bytes, expected at most {most}")
        return count

    def _u32(self) -> int:
        return self._unpack(_U32)

    def _u64(self) -> int:
        return self._unpack(_U64)

    def _unpack(self, kind: struct.Struct) -> int:
        if self._size - self._at < kind.size:
            self._fail(f"ends inside its header; the file has {self._size} bytes and is truncated")
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return int(value)

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {what}")

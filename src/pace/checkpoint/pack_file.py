"""A file of packed weights: written once, then mapped by whoever runs the model.

64 bytes (magic, version, length of the header, size of the file, SHA-256 of those and of the header), a JSON header, and
from the next 2 MiB on the weights as the kernels read them. The header has what was packed by which tier, and of every
weight its kind, form, shape, place and size. All of that is checked when the file is opened, so that what is mapped is in
the file and as large as its shape says; the numbers themselves are not looked at.

The page cache keeps what is written in whole blocks of 2 MiB in pages of that size, where the file system has such (ext4
from Linux 6.16 on, XFS, Btrfs), and maps them so: then weights in a file are read as fast as weights in huge pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from pace.checkpoint.config_json import checkpoint_file, open_regular, parse_json
from pace.errors import CheckpointError, show

__all__ = ["PACK_FILE", "PackFile", "PackedArray", "pack_bytes", "pack_in", "write_pack"]

PACK_FILE: Final = "model.pack"
"""In a folder of `pace pack`."""

VERSION: Final = 1
_MAGIC: Final = b"PACEPACK"
_PREFIX: Final = struct.Struct("<8sIIQ8x")
_HASH_BYTES: Final = 32
_START: Final = _PREFIX.size + _HASH_BYTES
_HUGE: Final = 2 << 20
_BLOCK: Final = 8 * _HUGE  # of one write
_PAGE: Final = 4096
_MAX_HEADER: Final = 16 << 20
_MAX_WEIGHTS: Final = 100_000
_MAX_SIZE: Final = 1 << 48
_SIZES: Final = {"bf16": 2, "f16": 2, "f32": 4}  # of vectors and tables

Kind = Literal["matrix", "table", "vector"]
_RANKS: Final[Mapping[str, tuple[int, ...]]] = {"matrix": (3,), "table": (2,), "vector": (1, 2)}


@dataclass(frozen=True)
class PackedArray:
    """A weight as bytes.

    Args:
        kind: a packed matrix, plain rows of a table, or a vector.
        form: the format of the matrix, or the type of the elements.
        shape: [count, n, k], [n, k], and [n] or [count, n].
        types: of the scales and zeros of a matrix.
        data: uint8 [bytes].
    """

    kind: Kind
    form: str
    shape: tuple[int, ...]
    types: tuple[int, int]
    data: npt.NDArray[np.uint8]


class _Entry(NamedTuple):
    """Where a weight's bytes are in the data."""

    kind: Kind
    form: str
    shape: tuple[int, ...]
    types: tuple[int, int]
    at: int
    n_bytes: int


def pack_in(directory: Path) -> Path | None:
    """The pack of a folder of `pace pack`, None where it is another.

    Raises:
        CheckpointError: there are other weights beside it.
    """
    path = checkpoint_file(directory, PACK_FILE) if directory.is_dir() else None
    other = None if path is None else next(directory.glob("model*.safetensors"), None)
    if other is not None:
        raise CheckpointError(
            f"{directory}: holds {PACK_FILE} and {other.name}; remove the one that is not meant"
        )
    return path


class PackFile:
    """A pack, opened and checked; its weights stay mapped as long as an array of them lives.

    Attributes:
        path: of the file.
        about: what the header says beside the weights.

    Raises:
        CheckpointError: it can't be opened, is no pack, of another version, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file, size = open_regular(path)
        with file:
            header, start = _read_header(path, file, size)
            weights = header.pop("weights", None)
            self.about: dict[str, Any] = header
            if not isinstance(weights, dict) or not 0 < len(weights) <= _MAX_WEIGHTS:
                raise CheckpointError(
                    f"{path}: its weights are {show(weights)}, expected 1 to {_MAX_WEIGHTS}"
                )
            self._entries = {
                name: _read_entry(f"{path}: {show(name)}", value) for name, value in weights.items()
            }
            _check_places(path, self._entries, size - start)
            try:
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        self._data = np.frombuffer(mapped, np.uint8)[start:]

    def names(self) -> tuple[str, ...]:
        """Of all weights."""
        return tuple(self._entries)

    def __getitem__(self, name: str) -> PackedArray:
        """A weight, mapped; KeyError where there is none of that name."""
        kind, form, shape, types, at, n_bytes = self._entries[name]
        return PackedArray(kind, form, shape, types, self._data[at : at + n_bytes])

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def pack_bytes(weights: Mapping[str, PackedArray]) -> int:
    """About how large a file of these gets."""
    return sum(weight.data.nbytes + _PAGE for weight in weights.values()) + 2 * _HUGE


def write_pack(fd: int, about: Mapping[str, Any], weights: Mapping[str, PackedArray]) -> None:
    """Write a pack to an empty file, and wait until the disk has it.

    Raises:
        OSError: it has no room, or fails.
    """
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name, weight in weights.items():
        entries[name] = {
            "kind": weight.kind,
            "form": weight.form,
            "shape": list(weight.shape),
            "types": list(weight.types),
            "at": at,
            "bytes": weight.data.nbytes,
        }
        at = _round_up(at + weight.data.nbytes, _PAGE)
    header = json.dumps({**about, "weights": entries}, allow_nan=False).encode()
    start = _round_up(_START + len(header), _HUGE)
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(header), start + _round_up(at, _HUGE))
    out = _BlockWriter(fd)
    for part in (prefix, hashlib.sha256(prefix + header).digest(), header):
        out.write(np.frombuffer(part, np.uint8))
    out.fill(_HUGE)
    for weight in weights.values():
        out.write(weight.data)
        out.fill(_PAGE)
    out.fill(_HUGE)
    out.end()
    os.fsync(fd)


class _BlockWriter:
    """Writes whole blocks, see the module."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._block = np.zeros(_BLOCK, np.uint8)
        self._n = 0

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        while len(data):
            n = min(len(data), _BLOCK - self._n)
            self._block[self._n : self._n + n] = data[:n]
            self._n += n
            data = data[n:]
            if self._n == _BLOCK:
                self.end()

    def fill(self, unit: int) -> None:
        """Zeros up to the next multiple."""
        self.write(np.zeros(-self._n % unit, np.uint8))

    def end(self) -> None:
        """Write what there is."""
        left = memoryview(self._block[: self._n].data)
        while len(left):
            left = left[os.write(self._fd, left) :]
        self._n = 0


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _read_header(path: Path, file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    start = file.read(_START) or b""
    if start[: len(_MAGIC)] != _MAGIC or len(start) < _START:
        raise CheckpointError(f"{path}: is no file of packed weights; run pace pack again")
    _, version, n, whole = _PREFIX.unpack(start[: _PREFIX.size])
    if version != VERSION:
        raise CheckpointError(f"{path}: is of version {version}, this is {VERSION}; run pace pack again")
    if whole != size:
        raise CheckpointError(f"{path}: has {size} bytes of {whole}; copy it again, or run pace pack again")
    data_start = _round_up(_START + n, _HUGE)
    header = (file.read(n) or b"") if n <= _MAX_HEADER else b""
    if (
        len(header) != n
        or data_start > size
        or start[_PREFIX.size :] != _hash(start[: _PREFIX.size] + header)
    ):
        raise CheckpointError(f"{path}: its header is damaged; copy it again, or run pace pack again")
    return parse_json(header, f"{path}: header"), data_start


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _read_entry(where: str, value: object) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"kind", "form", "shape", "types", "at", "bytes"}:
        raise CheckpointError(f"{where} is {show(value)}, expected kind, form, shape, types, at and bytes")
    kind, form = value["kind"], value["form"]
    shape, types = _sizes(value["shape"]), _sizes(value["types"])
    place = _sizes([value["at"], value["bytes"]])
    if not isinstance(kind, str) or not isinstance(form, str) or kind not in _RANKS:
        raise CheckpointError(f"{where} is {show(kind)} of {show(form)}, expected one of {', '.join(_RANKS)}")
    if shape is None or len(shape) not in _RANKS[kind] or 0 in shape or types is None or len(types) != 2:
        raise CheckpointError(f"{where} has shape {show(value['shape'])} and types {show(value['types'])}")
    if place is None or place[0] % _PAGE or place[1] == 0:
        raise CheckpointError(f"{where} is at {show(value['at'])} with {show(value['bytes'])} bytes")
    if kind != "matrix" and place[1] != math.prod(shape) * _SIZES.get(form, 0):
        raise CheckpointError(
            f"{where} has {place[1]} bytes, which is no {kind} {list(shape)} of {show(form)}"
        )
    return _Entry(cast(Kind, kind), form, shape, (types[0], types[1]), place[0], place[1])


def _sizes(values: object) -> tuple[int, ...] | None:
    fine = isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)
    return tuple(values) if fine and isinstance(values, list) else None


def _check_places(path: Path, entries: Mapping[str, _Entry], n_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].at):
        if entry.at < end or entry.at + entry.n_bytes > n_bytes:
            raise CheckpointError(
                f"{path}: {show(name)} has bytes {entry.at} to {entry.at + entry.n_bytes}, expected {end} to {n_bytes}"
            )
        end = entry.at + entry.n_bytes

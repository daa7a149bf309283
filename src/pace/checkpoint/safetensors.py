"""Reads `safetensors` checkpoints: one file or shards with an index, mapped into memory, checked completely
first.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
data. The Rust reader accepts a 100 MB header (1 M tensors cost it 2.7 s and 934 MB) and the last of two equal
keys; this one checks, before any data is touched, that names are unique, that the byte ranges tile the data
without gap or overlap, that each range is what shape and dtype need, that a tensor in two shards is the same in both, and
that the shards hold what the index lists. What only repeats that (total_size, which shard a tensor is in, metadata) is
not taken for a checksum: tools leave it stale.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.checkpoint.config_json import (
    MAX_JSON_BYTES,
    adapter_hint,
    checkpoint_file,
    open_regular,
    parse_json,
    read_file,
)
from pace.errors import CheckpointError, show
from pace.log import logger

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "Checkpoint", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_SHARDS = 2_000
MAX_RANK = 8
MAX_NAME_LEN = 512

_COMPARED_BYTES = 1 << 20
_SHARD_NAME = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)

# Formats that numpy lacks are given as their bits.
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name in the checkpoint.
        dtype: the format's name, such as "BF16", "F16", "F32".
        shape: its sizes, slowest first.
        file: the file that holds it.
        offset: its first byte in the file.
        n_bytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


class Checkpoint:
    """The tensors of a checkpoint folder; everything about them is checked when it is opened.

    Attributes:
        matrices: quantised ones; none, for what a tensor means its config says.

    Arrays that `tensor` returns are read-only views of the mapped files: reading one pages it in, `drop`
    gives its pages back. They stay valid after `close`. A file that is truncated meanwhile is seen when a tensor is asked
    for; after that, touching the array is a SIGBUS, except in `ops.PackedMatrix.pack`.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open `model.safetensors`, else the shards that `model.safetensors.index.json` lists or, without one, a
        complete set of `model-00001-of-0000N.safetensors`.

        Raises:
            CheckpointError: no such files, or anything about them is malformed, contradictory or over a
                limit.
        """
        self.directory = Path(directory)
        self.matrices: Mapping[str, Any] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such folder")
        try:
            single = checkpoint_file(self.directory, SINGLE_FILE)
            if single is not None:
                self._add(single)
                if any(
                    self.directory.glob(SHARDS)
                ):  # two models in one folder, perhaps; transformers takes the same one
                    logger.warning("%s: %s is read, not the shards beside it", self.directory, SINGLE_FILE)
            else:
                self._open_shards()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the files and of the data in them."""
        return tuple(self._tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.n_bytes for info in self._tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor without touching its data.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {show(name)}") from None

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a read-only C-contiguous array [shape]; BF16 as uint16, 8-bit floats as uint8.

        A view of the mapped file, or a copy in the rare file whose data isn't aligned to the element size.

        Raises:
            CheckpointError: there is no such tensor, the checkpoint is closed, or the file is shorter than it was.
        """
        info = self.info(name)
        mapped = self._maps.get(info.file)
        if mapped is None:
            raise CheckpointError(f"{self.directory}: the checkpoint is closed")
        if mapped.size() < len(mapped):
            raise CheckpointError(
                f"{info.file}: {mapped.size()} bytes, it had {len(mapped)} when it was opened; copy the checkpoint again, "
                "and load it when that is done"
            )
        dtype = _DTYPES[info.dtype]
        if info.n_bytes == 0:
            return np.empty(info.shape, dtype)
        array = np.frombuffer(mapped, dtype, info.n_bytes // dtype.itemsize, info.offset).reshape(info.shape)
        return array if array.flags.aligned else array.copy()

    def willneed(self, name: str) -> None:
        """Ask the system to read a tensor's pages in the background."""
        self._advise(name, mmap.MADV_WILLNEED)

    def drop(self, name: str) -> None:
        """Give a tensor's pages back to the system; reading it again reads the file again.

        The first and last page may hold a neighbour's bytes too: those return from the page cache when it is
        read.
        """
        self._advise(name, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the files; those that arrays still refer to are unmapped with the last of them."""
        for mapped in self._maps.values():
            with suppress(BufferError):  # an array still refers to it, and keeps it alive
                mapped.close()
        self._maps.clear()

    def _advise(self, name: str, advice: int) -> None:
        info = self.info(name)
        mapped = self._maps.get(info.file)
        if mapped is None or info.n_bytes == 0:
            return
        start = info.offset - info.offset % mmap.PAGESIZE
        mapped.madvise(advice, start, info.offset + info.n_bytes - start)

    def _open_shards(self) -> None:
        path = checkpoint_file(self.directory, INDEX_FILE)
        if path is None:
            for file in _numbered_shards(self.directory):
                self._add(file)
            return
        weight_map = _read_index(path)
        for shard in sorted(set(weight_map.values())):
            found = checkpoint_file(self.directory, shard)
            if found is None:
                raise CheckpointError(f"{path}: lists the shard {show(shard)}, which isn't in the folder")
            self._add(found)
        missing = sorted(weight_map.keys() - self._tensors.keys())
        if missing:
            raise CheckpointError(
                f"{path}: lists {show(missing[0])}, which no shard holds; download the model again"
            )

    def _add(self, path: Path) -> None:
        """Map one file and register its tensors."""
        file, size = open_regular(path)
        with file:
            tensors = _read_header(path, file.read(8) or b"", size, file.read)
            if len(self._tensors) + len(tensors) > MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {MAX_TENSORS} tensors in the checkpoint")
            try:
                self._maps[path] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        for info in tensors:
            other = self._tensors.setdefault(info.name, info)
            if other is not info and not self._equal(info, other):
                raise CheckpointError(
                    f"{path}: holds {show(info.name)}, as {other.file.name} does, with other values; remove the shard "
                    f"that is not part of the model from {INDEX_FILE}"
                )

    def _equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two places hold the same tensor; compared in pieces, as both are as large as the model has them."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        left, right = self._maps[one.file], self._maps[other.file]
        for at in range(0, one.n_bytes, _COMPARED_BYTES):
            end = min(at + _COMPARED_BYTES, one.n_bytes)
            if left[one.offset + at : one.offset + end] != right[other.offset + at : other.offset + end]:
                return False
        return True


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor -> shard. What else an index says (total_size) only repeats the shards."""
    data = read_file(path, MAX_JSON_BYTES)
    if data.count(b'"') > 4 * MAX_TENSORS + 4_000:  # cheap, and bounds what parsing can cost
        raise CheckpointError(f"{path}: more than {MAX_TENSORS} tensors")
    weight_map = parse_json(data, str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {show(weight_map)}, expected {{tensor: file}}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {show(name)} is in {show(shard)}, expected a .safetensors file name"
            )
    n_shards = len(set(weight_map.values()))
    if n_shards > MAX_SHARDS:
        raise CheckpointError(f"{path}: {n_shards} shards, expected at most {MAX_SHARDS}")
    return weight_map


def _numbered_shards(directory: Path) -> list[Path]:
    """The files `model-00001-of-0000N.safetensors` of a folder whose index is lost: their names say it all.

    Raises:
        CheckpointError: there are none, or one is missing; says what the folder has instead.
    """
    found = sorted(path.name for path in directory.glob(SHARDS))
    numbers = [match for name in found if (match := _SHARD_NAME.fullmatch(name))]
    counts = {int(match["count"]) for match in numbers}
    if numbers and len(counts) == 1 and [int(m["number"]) for m in numbers] == [*range(1, counts.pop() + 1)]:
        files = [checkpoint_file(directory, match[0]) for match in numbers]
        return [file for file in files if file is not None]
    others = [suffix for suffix in ("bin", "pt", "pth", "gguf") if any(directory.glob(f"*.{suffix}"))]
    hint = "; give its .gguf file itself as the model" if others else ""
    if others and others[0] != "gguf":
        hint = (
            f"; .{others[0]} files are not read, convert them to safetensors"
            f" with transformers: AutoModelForCausalLM.from_pretrained({directory.name!r}, dtype='auto')"
            ".save_pretrained('NEW_FOLDER')"
        )
    hint = adapter_hint(directory) or hint
    raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _read_header(path: Path, prefix: bytes, size: int, read: Any) -> list[TensorInfo]:
    """Parse and check a file's header; returns its tensors in the order of their data."""
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
    header_len = int.from_bytes(prefix, "little")
    if not 2 <= header_len <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {header_len} bytes, expected 2 to {MAX_HEADER_BYTES}")
    if header_len > size - 8:
        raise CheckpointError(
            f"{path}: a header of {header_len} bytes in a file of {size}; the file is truncated"
        )
    data = read(header_len) or b""
    if len(data) != header_len:
        raise CheckpointError(f"{path}: read {len(data)} of {header_len} header bytes")
    if data[:1] != b"{":
        raise CheckpointError(f"{path}: the header starts with {show(data[:1])}, expected {{")
    # Every tensor has a brace of its own and at most MAX_RANK + 3 commas; counting is 1000 times cheaper than
    # parsing.
    if data.count(b"{") > MAX_TENSORS + 2 or data.count(b",") > 16 * MAX_TENSORS:
        raise CheckpointError(f"{path}: the header has more than {MAX_TENSORS} tensors")
    header = parse_json(data, f"{path}: header")
    header.pop("__metadata__", None)  # free text: nothing is read from it
    data_start = 8 + header_len
    tensors = [_read_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.n_bytes))
    end = data_start
    for info in tensors:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {show(info.name)} {what} (byte {info.offset}, expected {end})")
        end += info.n_bytes
    if end != size:
        what = "the file is truncated" if end > size else "there are bytes that no tensor claims"
        raise CheckpointError(f"{path}: {size} bytes, but the header describes {end}; {what}")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: {show(name)}"
    if not 1 <= len(name) <= MAX_NAME_LEN:
        raise CheckpointError(f"{where}: a name of {len(name)} characters, expected 1 to {MAX_NAME_LEN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {show(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {show(dtype)}, expected one of {', '.join(_DTYPES)}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where} has shape {_show_list(shape)}, expected at most {MAX_RANK} sizes of 0 and more"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {_show_list(offsets)}, expected [begin, end]")
    n_bytes = offsets[1] - offsets[0]
    needed = math.prod(shape) * _DTYPES[dtype].itemsize  # Python's integers don't overflow
    if n_bytes != needed:
        raise CheckpointError(
            f"{where} has {show(n_bytes)} bytes, but {dtype} {_show_list(shape)} needs {show(needed)}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], n_bytes)


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _show_list(values: object) -> str:
    if isinstance(values, list) and len(values) <= MAX_RANK:
        return f"[{', '.join(show(value) for value in values)}]"
    return show(values)

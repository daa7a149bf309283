"""Strict reading of a checkpoint's small files: regular files inside the folder, bounded, JSON without
surprises.

`json.loads` alone keeps the last of two equal keys, takes NaN and Infinity, and turns 1e400 into infinity;
each of them has been used to make two readers of one file disagree.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pace.errors import CheckpointError, show

__all__ = [
    "MAX_JSON_BYTES",
    "adapter_hint",
    "checkpoint_file",
    "open_regular",
    "parse_json",
    "read_file",
    "read_json",
]

MAX_JSON_BYTES = 16 << 20  # the largest tokenizer_config.json and shard index in use are below 3 MB


def checkpoint_file(directory: Path, name: str) -> Path | None:
    """Return the path of the file `name` in `directory`, or None where there is none.

    A symbolic link may lead to any file, as people make folders of links beside a config of their own. In a snapshot of
    the hub cache, whose links come from a download, it must stay inside the cache: `…/snapshots/<commit>/` beside
    `…/blobs/`, which may itself be a link to another disk.

    Raises:
        CheckpointError: `name` is not a plain file name, or is a link that leaves the hub cache.
    """
    if name in ("", ".", "..") or len(name) > 255 or any(char in name for char in "/\\\0"):
        raise CheckpointError(
            f"{directory}: {show(name)} is not a file name; expected a name without a folder"
        )
    path = directory / name
    if not path.is_symlink():
        return path if os.path.lexists(path) else None
    root = Path(os.path.realpath(directory))
    repo = root.parent.parent
    cached = repo.name.startswith("models--")
    if root.parent.name == "snapshots" and (cached or (repo / "blobs").is_dir()):
        cache = repo.parent if cached else repo
        target = Path(os.path.realpath(path))
        if not any(
            target.is_relative_to(folder) for folder in (cache, Path(os.path.realpath(repo / "blobs")))
        ):
            raise CheckpointError(f"{path}: the link leaves the hub cache {cache}; download the model again")
    return path


def adapter_hint(directory: Path) -> str:
    """What to add to the error about a folder that lacks a model's files: "", or that it holds an adapter instead."""
    if not any((directory / f"adapter_{name}").exists() for name in ("config.json", "model.safetensors")):
        return ""
    return "; it holds an adapter, merge it into its model first, for instance with PEFT's merge_and_unload"


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file; returns it unbuffered, and its size in bytes.

    Raises:
        CheckpointError: it can't be opened, or is a folder, FIFO, socket or device (reading those could block
            for ever).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        # O_NONBLOCK: the path may have become a FIFO since, and opening one waits for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        file = os.fdopen(fd, "rb", buffering=0)  # the caller closes it
        status = os.fstat(fd)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise CheckpointError(f"{path}: not a regular file")
    return file, status.st_size


def read_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole regular file of 1 to `max_bytes` bytes.

    Raises:
        CheckpointError: as `open_regular`, or the file is empty, too large, or shorter than the system said.
    """
    file, size = open_regular(path)
    with file:
        if not 0 < size <= max_bytes:
            raise CheckpointError(f"{path}: {size} bytes, expected 1 to {max_bytes}")
        data = file.read(size) or b""
    if len(data) != size:
        raise CheckpointError(f"{path}: read {len(data)} of {size} bytes; the file changed while it was read")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: as `read_file` and `parse_json`.
    """
    return parse_json(read_file(path, max_bytes), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that hold one JSON object; `where` starts every message.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a key twice in one object, NaN, Infinity, a
            number that overflows, or nesting deeper than Python's stack.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply") from None
    except _Refused as error:
        raise CheckpointError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds {show(value)}, expected a JSON object")
    return value


class _Refused(Exception):
    """Carries a message out of json.loads; not a ValueError, which json uses itself."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {show(key)} appears twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"holds {name}, which is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"the number {show(text)} overflows")
    return value

"""A model's folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pace.checkpoint import ModelFiles
from pace.errors import ConfigError

__all__ = ["copy_rest", "new_folder"]

_LEFT: Final = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
)
_MOST_COPIED: Final = 64 << 20
_FOLDERS: Final = ("additional_chat_templates", "1_Pooling", "target_proj")
"""Of more chat templates, of an embedding model's pooling, and of a PARD-2 draft's projection."""
_GGUF_FILES: Final = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@contextmanager
def new_folder(out: Path, n_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and is gone when it does not.

    Raises:
        ConfigError: `out` exists and is not empty, its folder does not, another process is writing it, or the disk has no
            room for n_bytes, or none any more.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; name a new folder, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: no such folder")
    check_room(out.parent, n_bytes)
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(exist_ok=True)
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{partial}: cannot be made: {error.strerror or error}") from None
    try:
        if not _has(fd, partial):
            raise ConfigError(f"{out}: another process is writing it; wait for it, or name another folder")
        try:
            for left in partial.iterdir():  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            if out.is_dir():
                out.rmdir()
            partial.replace(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
            raise
    finally:
        os.close(fd)


def _has(fd: int, partial: Path) -> bool:
    """Whether this process, alone, has the folder of that name; the lock of one that was killed is gone with it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == partial.stat().st_ino
    except OSError:
        return False


def check_room(folder: Path, n_bytes: int) -> None:
    """Find out before long work whether a disk has room.

    Raises:
        ConfigError: it has none.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ConfigError(f"{folder}: {free >> 20} MiB are free, the model needs {n_bytes >> 20}")


def copy_rest(files: ModelFiles, folder: Path) -> None:
    """Tokenizer, templates and whatever else stands beside the weights, but weights of other formats; of a GGUF file what
    its folder would have."""
    if not files.path.is_dir():
        for name in _GGUF_FILES:
            values = files.json(name)
            if values is not None:
                (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        return
    for path in sorted(files.path.iterdir()):
        whole = not path.name.startswith(".") and path.is_file()
        if whole and not path.name.endswith(_LEFT) and path.stat().st_size <= _MOST_COPIED:
            shutil.copyfile(path, folder / path.name)
        elif path.name in _FOLDERS and path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)

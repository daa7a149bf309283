"""Packs that engines write on first use of a checkpoint, and map from then on: `pack_cache` of the options.

A pack is used for the very files that it was made from: of each its name, size and inode, the times of its last change and
of its inode's, and beside them config.json's values, the option that rounds, the ISA tier (rounding may differ in the last
bit), and the versions of pace and of the layouts. Writing a file, or putting another in its place, changes the time of an
inode, which no program can set; content is not read, as that would take as long as packing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pace import ops
from pace.checkpoint import ModelFiles
from pace.checkpoint.pack_file import PackFile, pack_bytes, write_pack
from pace.config import VERSION
from pace.engine.guard import Measured
from pace.engine.packing import Weight
from pace.engine.packs import about, arrays_of
from pace.errors import PaceError
from pace.log import logger

__all__ = ["PackCache"]

_TICK = 0.05  # seconds within which two changes of a file may have one time


class PackCache:
    """The place of one checkpoint's pack.

    Args:
        directory: of all packs; it is made when the first is written.
        files, values: the checkpoint, and its config.json.
        quantization: the option.

    Attributes:
        path: of the pack.
    """

    def __init__(
        self, directory: str, files: ModelFiles, values: Mapping[str, Any], quantization: str | None
    ) -> None:
        self._files = files
        self._quantization = quantization
        self._options = [
            VERSION,
            ops.PACKED_LAYOUTS,
            ops.isa(),
            quantization,
            json.dumps(values, sort_keys=True),
        ]
        self._source = self._find_source()
        # One checkpoint, tier and option have one file: what is stale is replaced.
        key = hashlib.sha256(f"{files.path}\0{ops.isa()}\0{quantization}".encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9._-]", "_", files.path.name)[:64]
        self.path = Path(directory).expanduser() / f"{name}-{key}.pack"

    def find(self) -> PackFile | None:
        """The pack, None where there is none that fits."""
        if not self.path.exists():
            return None
        try:
            pack = PackFile(self.path)
        except PaceError as error:
            logger.info("%s; it is written anew", error)
            return None
        if pack.about.get("source") == self._source:
            return pack
        logger.info("%s: the checkpoint, or an option, is another; it is written anew", self.path)
        return None

    def store(self, weights: Mapping[str, Weight], measured: Measured | None) -> None:
        """Write the pack; what prevents that is a warning, as the model runs without."""
        if self._find_source() != self._source:
            logger.warning("%s changed while it was read; no pack is kept", self._files.path)
            return
        arrays = arrays_of(weights)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free, needed = shutil.disk_usage(self.path.parent).free, pack_bytes(arrays)
            if free < needed:
                logger.warning("%s: %d MiB are free, the pack needs %d", self.path, free >> 20, needed >> 20)
                return
            with _replacing(self.path) as fd:
                if fd is None:
                    logger.info("%s: another process writes it", self.path)
                    return
                write_pack(fd, about(weights, self._quantization, measured, self._source), arrays)
        except OSError as error:
            logger.warning("%s: no pack is kept: %s", self.path, error.strerror or error)
        else:
            logger.info("%s: written", self.path)

    def _find_source(self) -> str:
        """What tells this checkpoint, under these options, from others."""
        paths = self._files.weight_paths()
        stats = [path.stat() for path in paths]
        newest = max((stat.st_ctime for stat in stats), default=0.0)
        # A change that comes in the same tick as the one before it would not be seen.
        time.sleep(min(max(newest + _TICK - time.time(), 0.0), _TICK))
        facts = [
            [path.name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            for path, stat in zip(paths, stats, strict=True)
        ]
        return hashlib.sha256(json.dumps([self._options, facts]).encode()).hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[int | None]:
    """An empty file that takes the place of another when the block ends well, and is gone when it does not; None where
    somebody else writes it. Who has the lock of the file has the file: one that a killed process left has none."""
    partial = path.with_name(f".{path.name}.partial")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _locks(fd, partial):
            yield None
            return
        try:
            os.ftruncate(fd, 0)
            yield fd
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(path.parent)
    finally:
        os.close(fd)


def _locks(fd: int, path: Path) -> bool:
    """Whether this process has the file of that name now, and nobody else."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == path.stat().st_ino  # else it has just become the pack
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    """The new name is to survive a power cut, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Functions of the C library replaced in a child process, by a library that the test compiles and preloads."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


def preloading(source: str, path: Path) -> dict[str, str]:
    """Compile C into the shared library `path`; the environment of a child that loads it first. Skips the test where
    there is no compiler."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[-1]) is None:
        pytest.skip("needs a C compiler")
    subprocess.run(
        [*command, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-x", "c", "-", "-o", str(path), "-ldl"],
        input=source,
        text=True,
        check=True,
        timeout=60,
    )
    before = os.environ.get("LD_PRELOAD")  # a sanitizer's, see tests/sanitize.sh
    return {"LD_PRELOAD": f"{before} {path}" if before else str(path)}

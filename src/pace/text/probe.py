"""Trying an unusual `tokenizer.json` in a child process, where it can neither hang, exhaust nor kill this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["probe"]

TIMEOUT_S = 120.0
"""Wall time; the child bounds its CPU time itself, to a few seconds where the file is read in a few tenths."""

_PYTHON = re.compile(r"python(3(\.\d+)?)?t?")


def probe(data: bytes) -> str | None:
    """Read and try a tokenizer in a child process; takes 0.2 to 3 s, a few seconds more where it is found to be slow:
    while a virtual machine stands still its processes seem to use the CPU, so one slow child proves nothing.

    Args:
        data: the bytes of a `tokenizer.json`.

    Returns:
        What the tokenizer does to the process that uses it, as a clause; None: nothing bad was found.
    """
    harm, is_slow = _try(data)
    return _try(data)[0] if is_slow else harm


def _try(data: bytes) -> tuple[str | None, bool]:
    """What one child finds, and whether that is a matter of time."""
    command = _command()
    if command is None:
        return "it can't be tried, because there is no Python interpreter to start beside this process", False
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        # subprocess starts a new program, so other threads of this process don't matter. A session of its own: Ctrl-C
        # is for this process, which then ends the child.
        done = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            cwd="/",
            start_new_session=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"trying it takes longer than {TIMEOUT_S:g} s", False
    except OSError as error:
        return f"it can't be tried: {command[0]}: {error.strerror or error}", False
    return _verdict(done.stdout, done.returncode)


def _verdict(output: bytes, code: int) -> tuple[str | None, bool]:
    """The child's last line is its verdict, or says what it died of."""
    lines = output.splitlines()
    if not lines:
        return f"it can't be tried: the child process ended with code {code} before it began", False
    last = json.loads(lines[-1])
    if "harm" in last:
        harm = last["harm"]
        return None if harm is None else str(harm), bool(last["slow"])
    doing = str(last["doing"])
    if code == -signal.SIGPROF:
        return f"it takes too long: {doing}", True
    # A parent that ignores SIGCHLD learns no code.
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
    return f"it ends the process ({name}) while {doing}", False


def _command() -> list[str] | None:
    python, script, library = (
        _interpreter(),
        Path(__file__).with_name("probe_child.py"),
        find_spec("tokenizers"),
    )
    if python is None or not script.is_file() or library is None or library.origin is None:
        return None
    return [python, "-I", str(script.resolve()), str(Path(library.origin).resolve().parents[1])]


def _interpreter() -> str | None:
    """A Python like this one. Where Python is embedded, sys.executable is empty, or the program itself, which must not
    be started again."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [
        sys.executable,
        getattr(sys, "_base_executable", None),
        *(str(Path(prefix, "bin", name)) for prefix in (sys.exec_prefix, sys.base_exec_prefix)),
        shutil.which(name),
    ]
    for path in candidates:
        if path and _PYTHON.fullmatch(Path(path).name) and os.access(path, os.X_OK):
            return path
    return None

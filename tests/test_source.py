"""Formatters, type checker and the built module's symbols."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXT = ROOT / "src" / "pace" / "_ext"
C_FILES = sorted([*EXT.glob("*.c"), *EXT.glob("*.h")])

in_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file() or not C_FILES, reason="needs the source checkout"
)


def command(name: str, module: str | None = None) -> list[str]:
    """How to run a tool: beside this interpreter, on PATH, or as a module; skips the test if nowhere."""
    beside = Path(sys.executable).with_name(name)
    if beside.is_file():
        return [str(beside)]
    if module is not None and importlib.util.find_spec(module) is not None:
        return [sys.executable, "-m", module]
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return [found]


def run(*args: str | Path) -> str:
    """Run in the checkout; fails the test with the tool's own words."""
    done = subprocess.run(
        [str(arg) for arg in args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@in_checkout
def test_ruff() -> None:
    run(*command("ruff", "ruff"), "check", "src", "tests", "bench")


@in_checkout
def test_mypy() -> None:
    """Of src, tests and bench, strictly: about a minute without .mypy_cache, then seconds."""
    run(*command("mypy", "mypy"))


@in_checkout
def test_clang_format() -> None:
    run(*command("clang-format"), "--dry-run", "-Werror", *C_FILES)


@in_checkout
@pytest.mark.parametrize("cpu", ["haswell", "cooperlake", "sapphirerapids"])
def test_no_warning(cpu: str) -> None:
    """Of the compiler, which nobody sees in a build that passes; casts that take const away among them."""
    compiler = command(shlex.split(os.environ.get("CC", ""))[-1] if os.environ.get("CC") else "cc")
    strict = ("-std=gnu11", "-Wall", "-Wextra", "-Wcast-qual", "-Werror", "-fsyntax-only")
    for file in [EXT / "table.c"] if cpu != "haswell" else sorted(EXT.glob("*.c")):
        march = [f"-march={cpu}", "-DPACE_ISA=x"] if file.name == "table.c" else []
        run(*compiler, *strict, *march, file)


def module_path() -> Path:
    spec = importlib.util.find_spec("pace._ext._kernels")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def test_the_module_exports_only_its_init_function() -> None:
    """All else is hidden: no symbol of one tier can be resolved to another's, or another library's."""
    symbols = run(*command("nm"), "-D", "--defined-only", module_path()).split()[2::3]
    assert symbols == ["PyInit__kernels"]


def test_baseline_code_uses_no_vectors_beyond_sse() -> None:
    """Code outside the tables runs before the CPU is known: no ymm, zmm or mask register in it.

    Hidden functions have no dynamic symbol, so a stripped module cannot be told apart; a built tree can.
    """
    text = run(*command("nm"), module_path(), "--defined-only")
    if "pace_team_run" not in text:
        pytest.skip("the module is stripped")
    listing = run(*command("objdump"), "-d", "--no-show-raw-insn", module_path())
    wide = re.compile(r"%[yz]mm|%k[1-7]")
    baseline = (
        "pace_",
        "sample_worker",
        "roof_worker",
        "step_worker",
        "pack_worker",
        "PyInit",
        "__pyx",
        "draw",
        "edit",
    )
    found, checked, name = set(), 0, ""
    for line in listing.splitlines():
        head = re.match(r"[0-9a-f]+ <([^>]+)>:", line)
        if head:
            name = head.group(1)
            checked += name.startswith(baseline)
        elif name.startswith(baseline) and wide.search(line):
            found.add(name)
    assert checked > 40 and not found


@in_checkout
def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by it: a second one stops the run, but only one that collects both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})

"""`pace train pard` before torch is needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pace.cli import main


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, pace.cli; sys.exit(bool({'torch', 'transformers', 'pace.train'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of those that are missing; that others are there too is pretended, for CI has none of them here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torch" else object())
    assert main(["train", "pard", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "training needs torch; pip install 'pace[train]'" in capsys.readouterr().err


def test_a_missing_recipe_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("torch", "transformers", "matplotlib"):
        pytest.importorskip(name)
    assert main(["train", "pard", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "recipe.toml: cannot be read" in capsys.readouterr().err

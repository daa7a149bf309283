"""Makes `golden` importable and shares loaded models between tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import tiny
from golden.harness import Model, load


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """golden_model(name): a case of tiny.py, written, read back and loaded once per session."""
    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            directory = tiny.write(name, tmp_path_factory.mktemp("golden") / name)
            loaded[name] = load(directory, tiny.CASES[name].max_model_len)
        return loaded[name]

    return get

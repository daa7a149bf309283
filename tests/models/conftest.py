"""Makes `golden` importable and shares loaded models between tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import families, tiny
from golden.harness import Model, load
from models.traps import FamilyModel, config_of


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


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    """model_of(name, **changes): a case with its config changed, loaded once."""
    loaded: dict[str, Model] = {}

    def get(name: str, gain: float = 1.0, **changes: Any) -> Model:
        key = f"{name} {gain} {sorted(changes.items())!r}"
        if key not in loaded:
            case = replace(families.CASES[name], config=config_of(name, **changes), gain=gain)
            loaded[key] = load(tiny.write(name, tmp_path_factory.mktemp("trap"), case), 48)
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """transformers' logits of every case, at `tiny.GOLDEN_ROWS`."""
    with np.load(families.GOLDEN_FILE) as file:
        return {name: file[name] for name in file.files}

"""One tiny checkpoint for each file of tests."""

from __future__ import annotations

import pytest
from tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))

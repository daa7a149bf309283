"""Curves of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pace.train import curves

pytest.importorskip("matplotlib")


def test_acceptance_is_drawn_where_it_was_looked_at(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows: list[dict[str, Any]] = [{"step": i, "nats": [3.0 - i / 100, 4.0]} for i in range(1, 101)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [path.name for path in curves.draw(metrics, tmp_path)] == ["loss.png"]
    rows[-1] |= {"acceptance_length": 1.5, "acceptance_by_depth": [0.4, 0.1]}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = curves.draw(metrics, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "acceptance.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

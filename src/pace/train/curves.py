"""Loss and acceptance over the steps as PNG files; only this file needs matplotlib (the extra `pace[train]`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["draw"]

SMOOTH = 40
"""A curve's points are means over this part of the run, so that noise does not hide it."""


def draw(metrics: Path, folder: Path) -> list[Path]:
    """Write `loss.png` (surprise by depth) and, where held-out documents were looked at, `acceptance.png`.

    Args:
        metrics: JSON lines of the trainer.
        folder: where to.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    size = max(1, len(rows) // SMOOTH)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    steps = [group[-1]["step"] for group in groups]
    n_depths = len(rows[0]["nats"])

    def losses(axes: Any) -> None:
        for depth in range(n_depths):
            values = [sum(row["nats"][depth] for row in group) / len(group) for group in groups]
            axes.plot(steps, values, label=f"token {depth + 1}")
        axes.set_ylabel("cross-entropy, nats")

    looked = [row for row in rows if "acceptance_length" in row]

    def acceptances(axes: Any) -> None:
        at = [row["step"] for row in looked]
        for depth in range(n_depths):
            values = [row["acceptance_by_depth"][depth] for row in looked]
            axes.plot(at, values, marker=".", label=f"token {depth + 1}")
        axes.set_ylabel("held out: share of rounds that accept so far")
        axes.set_ylim(0, 1)
        axes.set_title(f"acceptance length in the end: {looked[-1]['acceptance_length']:.2f}", fontsize=10)

    paths = [_plot(folder / "loss.png", losses)]
    if looked:
        paths.append(_plot(folder / "acceptance.png", acceptances))
    return paths


def _plot(path: Path, fill: Callable[[Any], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display, no global state of pyplot
    axes = figure.add_subplot()
    fill(axes)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=120)
    return path

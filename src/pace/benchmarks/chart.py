"""A step-cost breakdown as a stacked bar chart. Only this file needs matplotlib (the extra `pace[bench]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pace.benchmarks.profile import StepProfile
from pace.errors import ConfigError

__all__ = ["check_chart", "save_chart"]

LABEL_SHARE = 0.04
"""Parts smaller than this share of a step have no room for their figure."""


def check_chart(path: str) -> None:
    """Find out before a long measurement whether its chart can be drawn.

    Raises:
        ConfigError: matplotlib is not installed, the name does not end in .png, or its folder doesn't exist.
    """
    if not path.lower().endswith(".png"):
        raise ConfigError(f"the chart's name is {path!r}, expected one that ends in .png")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; create it or choose another")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a chart needs matplotlib; pip install 'pace[bench]', or ask for the table alone")


def save_chart(profiles: Sequence[StepProfile], path: str, title: str) -> None:
    """Write one bar per profile, stacked from each operator's share of the step."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(op.kind for profile in profiles for op in profile.ops))
    shares = {(i, op.kind): max(op.share, 0.0) for i, profile in enumerate(profiles) for op in profile.ops}
    figure = Figure(figsize=(2.5 + 1.6 * max(2, len(profiles)), 6), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display, no global state of pyplot
    axes = figure.add_subplot()
    places = range(len(profiles))
    bottoms = [0.0] * len(profiles)
    for n, kind in enumerate(kinds):
        heights = [shares.get((i, kind), 0.0) for i in places]
        axes.bar(places, heights, 0.7, bottom=bottoms, label=kind, color=colormaps["tab20"](n % 20))
        for i, height in enumerate(heights):
            if height >= LABEL_SHARE:
                text = f"{height * profiles[i].step_s * 1e3:.3g} ms"
                axes.text(i, bottoms[i] + height / 2, text, ha="center", va="center", fontsize=8)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(list(places), [f"{p.phase}\n{p.step_s * 1e3:.3g} ms" for p in profiles], fontsize=8)
    axes.set_ylabel("share of the step")
    axes.set_ylim(0, 1.02)
    axes.set_title(title, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

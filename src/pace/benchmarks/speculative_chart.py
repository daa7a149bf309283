"""A speculative evaluation as a chart: speed-up by K, acceptance by position and by length of draft, and where time went.

Needs matplotlib (`pace[bench]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pace.benchmarks.speculative import PLAIN, SpeculativeResult
from pace.benchmarks.speculative_arm import Arm

__all__ = ["save_speculative_chart"]


def save_speculative_chart(result: SpeculativeResult, path: str) -> None:
    """Write the chart; `chart.check_chart` has found that it can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display, no global state of pyplot
    (speed, acceptance), (lengths, times) = figure.subplots(2, 2)
    arms = [arm for arm in result.arms if arm.method != PLAIN]
    ticks = list(dict.fromkeys(str(arm.k) for arm in arms))
    sizes = list(dict.fromkeys(arm.batch_size for arm in result.arms))
    for method, size in dict.fromkeys((arm.method, arm.batch_size) for arm in arms):
        own = [arm for arm in arms if (arm.method, arm.batch_size) == (method, size)]
        label = method if len(sizes) == 1 else f"{method}, batch {size}"
        places = [ticks.index(str(arm.k)) for arm in own]
        speed.plot(places, [arm.speedup for arm in own], marker="o", label=label)
        for place, arm in zip(places, own, strict=True):
            speed.annotate(
                f"{arm.mean_acceptance_length:.2f}",
                (place, arm.speedup),
                fontsize=7,
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
            )
        deepest = max(own, key=lambda arm: len(arm.acceptance_rates))
        positions = range(1, len(deepest.acceptance_rates) + 1)
        acceptance.plot(positions, deepest.acceptance_rates, marker="o", label=f"{label}, K = {deepest.k}")
        _draw_lengths(lengths, deepest, f"{label}, K = {deepest.k}")
    speed.axhline(1, color="gray", linewidth=1, linestyle="--")
    speed.set_xticks(range(len(ticks)), ticks)
    speed.set_xlabel("K; figures: mean acceptance length, the target's own token included")
    speed.set_ylabel(
        f"speed-up over {result.arms[0].tokens_per_s:.1f} tokens/s" if len(sizes) == 1 else "speed-up"
    )
    speed.set_ylim(bottom=0)
    acceptance.set_xlabel("position in the draft")
    acceptance.set_ylabel("share of drafted tokens that became output")
    acceptance.set_ylim(0, 1.02)
    lengths.set_xlabel("verified tokens of a draft")
    lengths.set_ylabel("of them accepted; area: share of the rounds")
    _draw_times(times, result.arms, len(sizes) > 1)
    for axes in (speed, acceptance, lengths):
        if arms:
            axes.legend(fontsize=8, frameon=False)
    title = f"{result.model}, draft {result.draft or 'none'}, {result.data}, batches of {', '.join(map(str, sizes))}"
    if result.synthetic_acceptance is not None:
        title += f"\nSYNTHETIC ACCEPTANCE {result.synthetic_acceptance}: only the times are real"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_lengths(axes: Any, arm: Arm, label: str) -> None:
    """A dot for every length of draft and number of accepted tokens, as large as the share of rounds that had them."""
    dots = [(n, a, count) for n, row in enumerate(arm.by_length) for a, count in enumerate(row) if count]
    drafted, accepted, counts = zip(*dots, strict=True) if dots else ((), (), ())
    sizes = [600 * count / max(1, arm.n_rounds) for count in counts]
    axes.scatter(drafted, accepted, s=sizes, alpha=0.5, label=label)


def _draw_times(axes: Any, arms: Sequence[Arm], has_sizes: bool) -> None:
    """A bar for every arm, parted into what the engine's steps went to."""
    names = [f"{arm.method} {arm.k or ''}" + (f", {arm.batch_size}" if has_sizes else "") for arm in arms]
    totals = [arm.draft_s + arm.verify_s + arm.sample_s + arm.other_s for arm in arms]
    left = [0.0] * len(arms)
    for part in ("draft", "verify", "sample", "other"):
        shares = [getattr(arm, f"{part}_s") / total for arm, total in zip(arms, totals, strict=True)]
        axes.barh(range(len(arms)), shares, left=left, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(arms)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the engine's time")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)

"""A speculative evaluation as a chart: speed-up by K, and acceptance by position. Needs matplotlib (`pace[bench]`)."""

from __future__ import annotations

from pace.benchmarks.speculative import PLAIN, SpeculativeResult

__all__ = ["save_speculative_chart"]


def save_speculative_chart(result: SpeculativeResult, path: str) -> None:
    """Write the chart; `chart.check_chart` has found that it can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display, no global state of pyplot
    speed, acceptance = figure.subplots(1, 2)
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
    for axes in (speed, acceptance):
        if arms:
            axes.legend(fontsize=8, frameon=False)
    title = f"{result.model}, draft {result.draft or 'none'}, {result.data}, batches of {', '.join(map(str, sizes))}"
    if result.synthetic_acceptance is not None:
        title += f"\nSYNTHETIC ACCEPTANCE {result.synthetic_acceptance}: only the times are real"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)

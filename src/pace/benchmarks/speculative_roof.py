"""What a round of speculation takes at least: the ideal beside which a speed-up is judged.

A plain step of n sequences has the roofline T_1, the step that verifies K guesses of each T_(K+1), the passes of the
draft T_d: for each, max(bytes / read roof, operations / dot roof), by the roofs measured around the steps. A round that
brings tau tokens can be tau * T_1 / (T_(K+1) + T_d) times as fast as plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from pace import ops
from pace.benchmarks.cost import Cost, step_cost
from pace.benchmarks.roofline import measure_dot, measure_read
from pace.models.plan import Plan

__all__ = ["Ideal", "RoofLog", "Round", "ideal"]


@dataclass
class RoofLog:
    """Roofs of one team, measured now and then."""

    reads: list[float] = field(default_factory=list)
    dots: list[float] = field(default_factory=list)

    def measure(self, team: ops.Team) -> None:
        """Measure both once, about 20 ms."""
        self.reads.append(measure_read(team))
        self.dots.append(measure_dot(team))

    def seconds(self, cost: Cost) -> float:
        """The roofline of a cost, by the medians."""
        return max(cost.n_bytes / median(self.reads), cost.n_flops / median(self.dots))


@dataclass(frozen=True)
class Round:
    """A round, as it was on average.

    Attributes:
        method: "pard": one pass of the draft; else one for each guess.
        k: guesses of each sequence, all verified.
        n_seqs: sequences.
        n_context: tokens of each before the round.
        n_tokens: that each gets by it.
    """

    method: str
    k: int
    n_seqs: int
    n_context: int
    n_tokens: float


@dataclass(frozen=True)
class Ideal:
    """Rooflines.

    Attributes:
        plain_s, verify_s, draft_s: T_1, T_(K+1) and T_d.
        speedup: tau * T_1 / (T_(K+1) + T_d).
    """

    plain_s: float
    verify_s: float
    draft_s: float
    speedup: float


def ideal(
    target: Plan, draft: Plan, one: Round, plain_roofs: RoofLog, roofs: RoofLog, kv_cache_dtype: str
) -> Ideal:
    """The rooflines of a round, and of a plain step instead.

    Args:
        plain_roofs: measured around the plain steps.
        roofs: measured around the rounds.
    """

    def step(plan: Plan, n_rows: int, n_logits: int) -> Cost:
        kv_len = [one.n_context + n_rows] * one.n_seqs
        return step_cost(plan, [n_rows] * one.n_seqs, kv_len, n_logits * one.n_seqs, kv_cache_dtype)

    n_new = max(1, round(one.n_tokens))  # what was committed since the draft's last pass
    if one.method == "pard":
        draft_s = roofs.seconds(step(draft, n_new + one.k - 1, one.k))
    else:
        draft_s = roofs.seconds(step(draft, min(2, n_new), 1)) + (one.k - 1) * roofs.seconds(
            step(draft, 1, 1)
        )
    plain_s = plain_roofs.seconds(step(target, 1, 1))
    verify_s = roofs.seconds(step(target, one.k + 1, one.k + 1))
    return Ideal(plain_s, verify_s, draft_s, one.n_tokens * plain_s / (verify_s + draft_s))

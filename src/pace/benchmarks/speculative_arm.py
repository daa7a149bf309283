"""One way of decoding prompts: what is counted while it runs, and the figures that come of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pace.benchmarks.speculative_roof import Ideal, RoofLog
from pace.outputs import RequestOutput, SpeculativeMetrics

__all__ = ["Arm", "Depth", "Tally"]

Depth = int | str
"""Tokens of a draft, K, or "auto"; "off" for plain decoding."""


@dataclass(frozen=True)
class Arm:
    """One way of decoding all prompts.

    Attributes:
        method: "ar", "pard" ...
        k: most tokens of a draft, or "auto"; 0 for "ar".
        batch_size: prompts that were decoded together.
        n_tokens: of all outputs.
        decode_s: from the first token of a batch to its last, over all batches.
        tokens_per_s: tokens behind the first ones, by decode_s.
        speedup: over plain decoding of the same prompts on the same engine, by decode_s per token.
        mean_acceptance_length: tokens of a round, the target's own included: 1 where nothing is accepted.
        acceptance_rates: by position, the share of its drafted tokens that became output, whatever came before them.
        histogram: rounds in which 0, 1, ... drafted tokens were accepted.
        by_length: the same for drafts of 0, 1, ... verified tokens apart: [n][a], as in `SpeculativeMetrics`.
        n_rounds: steps of a sequence that verified a draft.
        n_skipped: steps of a sequence that decoded plainly because the controller found that a draft would not pay.
        draft_s, verify_s, sample_s, other_s: of the engine's steps, prompts included: guessing, the target's passes, its
            sampler, all else.
        n_identical: requests whose tokens are those of plain decoding; all of them, unless acceptance is synthetic.
        n_requests: all.
        ideal_speedup: that the machine's roofs allow for tokens of a round as they were, see `speculative_roof`; None where
            K is not fixed or no model drafts.
        ideal_share: of that, what was reached.
        round_ratio: measured time of a round by the sum of its rooflines.
        rooflines: in seconds: a plain step, the step that verifies, the draft's passes.
    """

    method: str
    k: Depth
    batch_size: int
    n_tokens: int
    decode_s: float
    tokens_per_s: float
    speedup: float
    mean_acceptance_length: float
    acceptance_rates: list[float]
    histogram: list[int]
    by_length: list[list[int]]
    n_rounds: int
    n_skipped: int
    draft_s: float
    verify_s: float
    sample_s: float
    other_s: float
    n_identical: int
    n_requests: int
    ideal_speedup: float | None = None
    ideal_share: float | None = None
    round_ratio: float | None = None
    rooflines: tuple[float, float, float] | None = None


class Tally:
    """What became of the prompts in one way of decoding."""

    def __init__(self) -> None:
        self.n_tokens = self.n_behind_first = self.n_requests = self.n_identical = 0
        self.n_batches = self.n_skipped = self.n_context = (
            0  # n_context: of all outputs, tokens before the middle one
        )
        self.decode_s = self.draft_s = self.verify_s = self.sample_s = self.other_s = 0.0
        self.metrics = SpeculativeMetrics()
        self.roofs = RoofLog()

    def add(self, outputs: Sequence[RequestOutput], spent: Mapping[str, float]) -> None:
        """A batch was decoded; see `_Runner.spent` for what it took."""
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        firsts = [m.first_token_s for output in outputs if (m := output.metrics).first_token_s is not None]
        lasts = [m.finished_s for output in outputs if (m := output.metrics).finished_s is not None]
        self.n_batches += 1
        self.n_context += sum(len(output.prompt_token_ids) for output in outputs) + sum(tokens) // 2
        self.n_requests += len(outputs)
        self.n_tokens += sum(tokens)
        self.n_behind_first += sum(tokens) - len(tokens)
        self.decode_s += max(lasts) - min(firsts)
        self.n_skipped += round(spent["n_skipped"])
        self.draft_s += spent["draft_s"]
        self.verify_s += spent["run_s"]
        self.sample_s += spent["sample_s"]
        self.other_s += spent["step_s"] - spent["run_s"] - spent["draft_s"] - spent["sample_s"]
        for output in outputs:
            if output.speculative is not None:
                self.metrics.join(output.speculative)

    def join(self, other: Tally) -> None:
        """Count all of another one."""
        for name in ("n_tokens", "n_behind_first", "n_requests", "n_identical", "n_batches", "n_context"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("decode_s", "draft_s", "verify_s", "sample_s", "other_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def token_s(self) -> float:
        """Seconds for one token; NaN where no output has a second one."""
        return self.decode_s / self.n_behind_first if self.n_behind_first else math.nan

    @property
    def n_rounds(self) -> int:
        """Steps of a sequence behind its first token, with a draft or without."""
        return max(1, self.n_behind_first - self.metrics.n_accepted_tokens)

    def arm(self, method: str, k: Depth, batch_size: int, plain: Tally, ideal: Ideal | None = None) -> Arm:
        """The figures."""
        metrics = self.metrics
        speedup = plain.token_s / self.token_s
        round_s = self.decode_s / self.n_rounds * self.n_requests / max(1, self.n_batches)
        accepted = [metrics.n_rounds, *metrics.accepted_at, 0]
        return Arm(
            method=method,
            k=k,
            batch_size=batch_size,
            n_tokens=self.n_tokens,
            decode_s=self.decode_s,
            tokens_per_s=1 / self.token_s,
            speedup=speedup,
            mean_acceptance_length=metrics.mean_acceptance_length,
            acceptance_rates=metrics.acceptance_rates,
            histogram=[more - most for more, most in pairwise(accepted)] if metrics.n_rounds else [],
            by_length=metrics.by_length,
            n_rounds=metrics.n_rounds,
            n_skipped=self.n_skipped,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            sample_s=self.sample_s,
            other_s=self.other_s,
            n_identical=self.n_identical,
            n_requests=self.n_requests,
            ideal_speedup=None if ideal is None else ideal.speedup,
            ideal_share=None if ideal is None else speedup / ideal.speedup,
            round_ratio=None if ideal is None else round_s / (ideal.verify_s + ideal.draft_s),
            rooflines=None if ideal is None else (ideal.plain_s, ideal.verify_s, ideal.draft_s),
        )

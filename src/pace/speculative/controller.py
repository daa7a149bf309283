"""How many tokens to guess, and how many of the guesses to verify: what pays, by what steps cost and guesses were worth.

A round of n decoding sequences that verifies m guesses takes T_draft + T_target(n + m) and brings n tokens and one more for
each guess that stands. A plain step takes T_target(n) and brings n. Both rates are known from the steps that run; the
controller takes the better one. The draft's pass costs nearly the same for any number of guesses, so all are made and the
target verifies the best ones: guesses are sorted by the probability that they stand, and cut where one more row costs more
than it brings.

It is asked about wall time only: whatever it decides, outputs are the same.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.engine.sequence import Sequence
from pace.speculative.drafter import Proposal

__all__ = ["Controller", "StepCost"]

F64Array = npt.NDArray[np.float64]

WEIGHT, WEIGHT_SLOW = 0.15, 0.5
"""Of the newest time in an average, and in that of how slow the machine is."""

FREE_ROWS, ROW_SHARE = 16, 0.02
"""What is believed of a target before it has run: so many rows wait for its weights alone, each costing this much of the
first one's time; beyond, a step takes as long as it has rows."""

MARGIN = 1.03
"""By which speculation must be better than plain steps. They are measured in different minutes of the same machine."""

CHEAP = 0.005
"""Of a plain step: a drafter that takes less is always asked; only what to verify is a question then."""

FIRST_PROBE, PROBE_EVERY, PROBE_ROUNDS, PROBE_SHARE = 8, 256, 4, 0.01
"""While speculation does not pay, it is tried again after so many steps, in so many rounds of one sequence; less often
where that would take more than this share of the time."""

CLOSED_STEPS = 32
"""While speculation does not pay and as many sequences run, it is asked only once in so many steps whether it would, apart
from probes: that takes 0.2 ms when a step has emptied the caches, a plain step of the embedded model 0.7."""

FIRST_PLAIN, FIRST_FULL, FIRST_ROWS, PLAIN_EVERY = 2, 4, 2, 64
"""Steps that run plainly before anything is guessed; rounds that try guesses whatever they promise then; how many guesses
of a sequence such a round verifies at first, twice as many each time that all stand; and one of so many rounds is a plain
step, to know what that costs now: memory that gives 60 GB/s in one minute gives 35 in another. (Trying all guesses at
once, 250 steps with a draft that is never right came to 0.94 of plain decoding where a row costs 0.3 steps, now 0.97.)"""

FIRST_REACH, FEW_ROUNDS = 0.7, 3
"""Probability that a guess stands when those before it do, until there have been some; and of how many rounds it counts."""


class _Steady:
    """A moving average of times that a single one out of line does not move: each is the median of the newest three, to
    begin with the least.

    A machine that stands still for 0.1 s makes one plain step look ten times as dear, and drafting seem to pay until the
    next plain step, 64 rounds later: with averages of the times themselves, runs of 400 steps with a draft that is never
    right, one step in a hundred stalled, came to 0.85 of plain decoding in the median and 0.59 at worst where a row costs
    0.28 steps, now 0.99 and 0.98. (Plain steps also after 4 and 16 rounds brought nothing more.)
    """

    __slots__ = ("_newest", "n", "value")

    def __init__(self) -> None:
        self._newest: list[float] = []
        self.n = 0
        self.value = 0.0

    def add(self, time: float, weight: float = WEIGHT) -> None:
        self._newest = [*self._newest[-2:], time]
        self.n += 1
        if self.n <= 3:  # the first of its kind finds nothing in the caches
            self.value = min(self._newest)
        else:
            self.value += max(weight, 1 / (self.n - 2)) * (sorted(self._newest)[1] - self.value)


class StepCost:
    """Seconds of a step by its rows, learnt from steps: what was believed before, times what was measured near it, times
    how slow the machine is.

    The last is known from any step, so that times of different moments can be compared: while speculation runs, a plain
    step is one of 64, and what others cost changes by the minute where a VM's neighbours work. In simulated runs of 1000
    steps on a machine that becomes up to 2 or 4 times as slow for some 30 or 300 of them, in the whole or for few rows
    more than for many, the worst of 240 came to 0.71 to 0.93 of plain decoding without, now to 0.86 to 0.95; the median
    stayed. (Weights of 0.15, 0.3 and 1 instead of 0.5 and medians of the newest five: worse at worst, to 0.77.)
    """

    def __init__(self) -> None:
        self._slow = _Steady()  # seconds / what they should have been
        self._ratios: defaultdict[int, _Steady] = defaultdict(_Steady)  # by rows: seconds / believed
        # Those as arrays, rows as logarithms, ascending; None when a step has run since they were read.
        self._curve: tuple[F64Array, F64Array] | None = None
        self.n_steps = 0

    def observe(self, n_rows: int, seconds: float) -> None:
        """A step of n_rows took so long."""
        self.n_steps += 1
        key = n_rows if n_rows <= 2 * FREE_ROWS else n_rows // 8 * 8
        time, ratio = seconds / _believed_of(n_rows), self._ratios[key]
        if ratio.n > 1:
            self._slow.add(time / ratio.value, WEIGHT_SLOW)
        ratio.add(time / self.slow)
        self._curve = None

    @property
    def slow(self) -> float:
        """How slow the machine is now: times of one moment by this compare with those of another."""
        return self._slow.value if self._slow.n else 1.0

    def seconds(self, n_rows: npt.NDArray[Any]) -> F64Array:
        """Estimates for steps of so many rows each, f64 [n]."""
        if self._curve is None:
            rows = sorted(self._ratios)
            self._curve = np.log(rows), np.array([self._ratios[row].value for row in rows])
        seconds: F64Array = self.slow * _believed(n_rows) * np.interp(np.log(n_rows), *self._curve)
        return seconds


def _believed(n_rows: npt.NDArray[Any]) -> F64Array:
    free = 1 + ROW_SHARE * (np.minimum(n_rows, FREE_ROWS) - 1)
    cost: F64Array = free * np.maximum(1.0, n_rows / FREE_ROWS)
    return cost


@functools.lru_cache(4096)
def _believed_of(n_rows: int) -> float:
    return float(_believed(np.array([n_rows]))[0])


class _Reach:
    """Probability that the first j + 1 guesses stand, j = 0 .. K - 1: a moving average over rounds."""

    __slots__ = ("n_rounds", "values")

    def __init__(self, values: npt.NDArray[np.floating], n_rounds: int) -> None:
        self.values: F64Array = np.array(values, dtype=np.float64)
        self.n_rounds = n_rounds

    def add(self, n_draft: int, n_accepted: int) -> None:
        """A round: what lies behind a wrong guess does not stand; what lies behind right ones was not tried, and is as
        probable as before where these stand.
        """
        self.n_rounds += 1
        end = n_draft if n_accepted == n_draft else len(self.values)
        stands = np.arange(end) < n_accepted
        weight = max(0.05, 1.0 / (self.n_rounds + 1))
        before = float(self.values[end - 1]) if end else 1.0
        self.values[:end] += weight * (stands - self.values[:end])
        if 0 < end < len(self.values) and before > 0:
            self.values[end:] *= self.values[end - 1] / before

    def expect(self, first: int, chances: F64Array) -> None:
        """Guesses from `first` on were not worth verifying: what is known of them is how probable they were."""
        weight = max(0.05, 1.0 / (self.n_rounds + 2))
        self.values[first : len(chances)] += weight * (chances[first:] - self.values[first : len(chances)])


class Controller:
    """Decides for the sequences that leave it to the engine (`speculative: auto`).

    Args:
        max_tokens: K, guesses of one sequence at most.
        target: what steps cost, where another controller of the same target learns it.
    """

    def __init__(self, max_tokens: int, target: StepCost | None = None) -> None:
        self.max_tokens = max_tokens
        self.n_probes = 0
        self.is_open = True  # whether speculation paid when it was last asked
        self._target = StepCost() if target is None else target
        self._n_full = self._n_open = 0  # rounds that tried guesses; rounds since the last plain step
        self._most = FIRST_ROWS  # guesses of a sequence that such a round verifies
        # Seconds of a pass on a machine that is not slow, by the bit length of its sequences.
        self._draft_s: defaultdict[int, _Steady] = defaultdict(_Steady)
        self._all = _Reach(FIRST_REACH ** np.arange(1, max_tokens + 1), FEW_ROUNDS)
        self._own: dict[Sequence, _Reach] = {}
        # Share of guesses that stood, by tenths of their confidence: a mean with that as one guess more, which moves on.
        self._trust = np.zeros(11)
        self._tried = np.zeros(11, np.int64)
        # What stood of all guesses, and what their confidences claimed: how far one is believed in a tenth without any.
        self._stood = self._claimed = 1.0
        self._last: dict[Sequence, Seq[float] | None] = {}  # confidences of what is being verified
        # What a sequence's round verifies where confidences cut it, and what of that stands; none yet.
        self._cut: tuple[float, float] | None = None
        self._left = 0  # rounds of the probe that runs
        self._idle = PROBE_EVERY - FIRST_PROBE  # steps since speculation stopped
        self._interval = PROBE_EVERY
        # Sequences and rows for which it did not pay; steps until it is asked again.
        self._closed_for: tuple[int, int] | None = None
        self._closed_left = 0
        self._probe_s = self._plain_s = 0.0  # that the probe has cost; of a plain step

    def beside(self) -> Controller:
        """One for another drafter of the same target, which learns what steps cost from this one."""
        return Controller(self.max_tokens, self._target)

    def wanted(self, seqs: Seq[Sequence], n_rows: int) -> list[Sequence]:
        """Which of the sequences should get guesses now: all, none, or one for a probe.

        Args:
            seqs: those that decode and leave it to the engine.
            n_rows: sequences that decode in all.
        """
        if not seqs or self._target.n_steps < FIRST_PLAIN:
            return []
        if self._closed_left and not self._left and self._closed_for == (len(seqs), n_rows):
            self._closed_left -= 1
            return self._probed(seqs)
        self._closed_left = 0
        rounds = np.arange(self.max_tokens + 1)
        seconds = self._target.seconds(n_rows + rounds * len(seqs))
        self._plain_s = float(seconds[0])
        draft_s = self._draft_seconds(len(seqs))
        if draft_s < CHEAP * seconds[0]:
            self.is_open = True
            return list(seqs)
        stand = np.sum([self._reach(seq).values for seq in seqs], axis=0)
        rate = float(((n_rows + np.cumsum(stand)) / (draft_s + seconds[1:])).max())
        if self._cut is not None:
            n_cut, n_stand = (len(seqs) * each for each in self._cut)
            cut_s = float(self._target.seconds(np.array([n_rows + n_cut]))[0])
            rate = max(rate, (n_rows + n_stand) / (draft_s + cut_s))
        self.is_open = rate > MARGIN * n_rows / self._plain_s
        if self.is_open:
            self._idle, self._left = 0, 0
            self._n_open += 1
            return list(seqs) if self._n_open % PLAIN_EVERY else []
        self._closed_for, self._closed_left = (len(seqs), n_rows), CLOSED_STEPS - 1
        return self._probed(seqs)

    def cut(self, proposals: Mapping[Sequence, Proposal], n_rows: int) -> dict[Sequence, int]:
        """How many guesses of each proposal to verify.

        Args:
            n_rows: sequences that decode in all.
        """
        full = {seq: len(proposal.token_ids) for seq, proposal in proposals.items()}
        self._last = {seq: proposal.confidences for seq, proposal in proposals.items()}
        is_sure = all(proposal.confidences is not None for proposal in proposals.values())
        if self._target.n_steps < FIRST_PLAIN:
            return full
        # Whether the draft is as sure as it should be, those guesses tell that it doubts.
        if self.is_open:
            tries = self._n_full < FIRST_FULL
        else:  # a probe, which is to learn
            tries = self._left == PROBE_ROUNDS or not is_sure
        some = {seq: min(n, self._most) for seq, n in full.items()}
        if tries and sum(some.values()) <= 2 * FREE_ROWS:
            self._n_full += 1
            return some
        owners = [seq for seq, n in full.items() for _ in range(n)]
        if not owners:
            return full
        chances = {seq: self._chances(seq, proposals[seq]) for seq, n in full.items() if n}
        stand = np.concatenate(list(chances.values()))
        order = np.argsort(
            -stand, kind="stable"
        )  # of one sequence none stands more probably than the one before
        seconds = self._target.seconds(n_rows + np.arange(len(order) + 1))
        brought = n_rows + np.concatenate([[0.0], np.cumsum(stand[order])])
        best = int((brought / (self._draft_seconds(len(full)) + seconds)).argmax())
        counts = dict.fromkeys(full, 0)
        if is_sure:
            new = best / len(full), float(brought[best] - n_rows) / len(full)
            old = self._cut or new
            self._cut = (old[0] + 0.1 * (new[0] - old[0]), old[1] + 0.1 * (new[1] - old[1]))
        for i in order[:best].tolist():
            counts[owners[i]] += 1
        for seq, chance in chances.items():
            self._reach(seq).expect(counts[seq], chance)
            self._all.expect(counts[seq], chance)
        return counts

    def drafted(self, n_seqs: int, seconds: float) -> None:
        """A pass of the draft for n_seqs sequences took so long."""
        self._draft_s[n_seqs.bit_length()].add(seconds / self._target.slow)
        if self._left:
            self._probe_s += seconds

    def stepped(self, n_rows: int, seconds: float) -> None:
        """The target ran a step of n_rows without prompts."""
        self._target.observe(n_rows, seconds)
        if self._left:
            self._probe_s += max(0.0, seconds - self._plain_s)

    def verified(self, seq: Sequence, n_draft: int, n_accepted: int) -> None:
        """Learn from a round."""
        self._all.add(n_draft, n_accepted)
        self._reach(seq).add(n_draft, n_accepted)
        if n_accepted == n_draft >= self._most:
            self._most *= 2
        confidences = self._last.pop(seq, None)
        if confidences is not None:
            for i, confidence in enumerate(confidences[: min(n_draft, n_accepted + 1)]):
                key, stood = _tenth(confidence), float(i < n_accepted)
                old = self._trusted(confidence)
                self._stood += stood
                self._claimed += confidence
                self._tried[key] += 1
                self._trust[key] = old + max(0.02, 1.0 / (self._tried[key] + 1)) * (stood - old)

    def end(self, seq: Sequence) -> None:
        """The sequence does not run any more."""
        self._own.pop(seq, None)
        self._last.pop(seq, None)

    def _reach(self, seq: Sequence) -> _Reach:
        """What is known of a sequence: of all others, to begin with."""
        own = self._own.get(seq)
        if own is None:
            own = self._own[seq] = _Reach(self._all.values, FEW_ROUNDS)
        return own

    def _chances(self, seq: Sequence, proposal: Proposal) -> F64Array:
        """Probability that each guess stands, with those before it."""
        n = len(proposal.token_ids)
        if proposal.confidences is None:
            return np.minimum.accumulate(self._reach(seq).values[:n])
        trust = [self._trusted(confidence) for confidence in proposal.confidences[:n]]
        chances: F64Array = np.cumprod(np.array(trust))
        return chances

    def _trusted(self, confidence: float) -> float:
        """Probability that a guess of such confidence stands when those before it do."""
        key = _tenth(confidence)
        if self._tried[key]:
            return float(self._trust[key])
        return confidence * min(1.0, self._stood / self._claimed)

    def _draft_seconds(self, n_seqs: int) -> float:
        """Seconds of a pass for about so many sequences; 0 until one was seen."""
        if not self._draft_s:
            return 0.0
        size = n_seqs.bit_length()
        nearest = min(self._draft_s, key=lambda seen: (abs(seen - size), seen))
        return self._draft_s[nearest].value * self._target.slow

    def _probed(self, seqs: Seq[Sequence]) -> list[Sequence]:
        """While speculation loses: now and then the sequence that costs the least to read."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._interval = max(PROBE_EVERY, math.ceil(self._probe_s / (PROBE_SHARE * self._plain_s)))
                self._probe_s = 0.0
        else:
            self._idle += 1
            if self._idle >= self._interval:
                self._idle, self._left, self._most = 0, PROBE_ROUNDS, FIRST_ROWS
                self.n_probes += 1
                for reach in (self._all, *self._own.values()):  # what was long ago shall not outweigh it
                    reach.n_rounds = min(reach.n_rounds, FEW_ROUNDS)
        return [min(seqs, key=lambda seq: seq.n_tokens)] if self._left else []


def _tenth(confidence: float) -> int:
    return min(10, max(0, int(confidence * 10)))

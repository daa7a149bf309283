"""How many tokens to guess, and how many of the guesses to verify: what pays, by what steps cost and guesses were worth.

A round of n decoding sequences with k guesses each, of which m in all are verified, takes T_draft(k) + T_target(n + m) and
brings n tokens and one more for each guess that stands. A plain step takes T_target(n) and brings n. Both rates are known
from the steps that run; the controller takes the better one. Where the draft waits for its weights, all K guesses cost as
much as one; where it waits for arithmetic (many sequences, or a CPU without dot products of its format) each costs its
rows, and fewer are made. Of those made the target verifies the best ones: guesses are sorted by the probability that they
stand, and cut where one more row costs more than it brings.

It is asked about wall time only: whatever it decides, outputs are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.engine.sequence import Sequence
from pace.speculative.cost import DraftCost, F64Array, StepCost
from pace.speculative.drafter import Passes, Proposal

__all__ = ["Controller"]

MARGIN = 1.03
"""By which speculation must be better than plain steps. They are measured in different minutes of the same machine."""

CHEAP = 0.005
"""Of a plain step: a drafter that takes less is always asked for all it knows; only what to verify is a question then."""

FIRST_PROBE, PROBE_EVERY, PROBE_ROUNDS, PROBE_SHARE = 8, 256, 4, 0.01
"""While speculation does not pay, it is tried again after so many steps, in so many rounds of one sequence; less often
where that would take more than this share of the time."""

CLOSED_STEPS, OPEN_STEPS, EARLY_ROUNDS = 32, 4, 24
"""While as many sequences run, it is asked only once in so many steps whether speculation would pay, apart from probes, and
how many guesses do, after so many rounds: that takes 0.2 ms when a step has emptied the caches, a plain step of the
embedded model 0.4."""

FIRST_PLAIN, FIRST_FULL, FIRST_GUESSES, MANY_ROWS, PLAIN_EVERY = 2, 4, 2, 32, 64
"""Steps that run plainly before anything is guessed; rounds that verify all guesses whatever they promise then; how many
guesses of a sequence such a round makes at first, twice as many each time that all stand, and of all sequences at most;
and one of so many rounds is a plain step, to know what that costs now: memory that gives 60 GB/s in one minute gives 35 in
another. (Trying all guesses at once, 250 steps with a draft that is never right came to 0.94 of plain decoding where a row
costs 0.3 steps, now 0.97.)"""

MORE_EVERY = 16
"""Where fewer than K guesses are made, one of so many rounds makes twice as many: what those are worth is known from such
rounds alone."""

FIRST_REACH, FEW_ROUNDS = 0.7, 3
"""Probability that a guess stands when those before it do, until there have been some; and of how many rounds it counts."""


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
        _move(self.values, stands, max(0.05, 1.0 / (self.n_rounds + 1)))

    def expect(self, first: int, chances: F64Array, n_wanted: int) -> None:
        """Of n_wanted guesses those from `first` on were not worth verifying: what is known is how probable they were."""
        news = self.values[:n_wanted].copy()
        news[first : len(chances)] = chances[first:]
        _move(self.values, news, max(0.05, 1.0 / (self.n_rounds + 2)))


def _move(values: F64Array, news: npt.NDArray[Any], weight: float) -> None:
    """A moving average by position, of which the first are known; those behind change as the last of these."""
    end = len(news)
    before = float(values[end - 1]) if end else 0.0
    values[:end] += weight * (news - values[:end])
    if before > 0:
        values[end:] *= values[end - 1] / before


class _Cut:
    """What a sequence's round verifies where confidences cut it, by position of the guess: shares of rounds.

    Args:
        verified: guesses that were, f64 [k].
        stood: how many of these are expected to stand, f64 [k].
        max_tokens: K, of which the further ones are as probable as is thought before there were any.
    """

    __slots__ = ("stood", "verified")

    def __init__(self, verified: F64Array, stood: F64Array, max_tokens: int) -> None:
        tail = FIRST_REACH ** np.arange(1, max_tokens - len(verified) + 1)
        self.verified = np.concatenate([verified, verified[-1] * tail])
        self.stood = np.concatenate([stood, stood[-1] * tail])

    def add(self, verified: F64Array, stood: F64Array) -> None:
        """A round."""
        _move(self.verified, verified, 0.1)
        _move(self.stood, stood, 0.1)


class Controller:
    """Decides for the sequences that leave it to the engine (`speculative: auto`).

    Args:
        max_tokens: K, guesses of one sequence at most.
        target: what steps cost, shared by all controllers of it.
        passes: of the drafter, see `Drafter`.
    """

    def __init__(self, max_tokens: int, target: StepCost, passes: Passes) -> None:
        self.max_tokens = max_tokens
        self.n_probes = 0
        self.is_open = True  # whether speculation paid when it was last asked
        self._target = target
        self._draft = DraftCost(target, passes)
        self._n_full = self._n_open = 0  # rounds that tried guesses; rounds in which speculation paid
        self._most = FIRST_GUESSES  # of a sequence in a round that tries
        self._tries = False  # this round does
        self._n_wanted = 0  # guesses of a sequence that were asked for
        self._all = _Reach(FIRST_REACH ** np.arange(1, max_tokens + 1), FEW_ROUNDS)
        self._own: dict[Sequence, _Reach] = {}
        # Share of guesses that stood, by tenths of their confidence: a mean with that as one guess more, which moves on.
        self._trust = np.zeros(11)
        self._tried = np.zeros(11, np.int64)
        # What stood of all guesses, and what their confidences claimed: how far one is believed in a tenth without any.
        self._stood = self._claimed = 1.0
        self._last: dict[Sequence, Seq[float] | None] = {}  # confidences of what is being verified
        self._cut: _Cut | None = None  # none yet
        self._left = 0  # rounds of the probe that runs
        self._idle = PROBE_EVERY - FIRST_PROBE  # steps since speculation stopped
        self._interval = PROBE_EVERY
        # Sequences and rows for which it was asked; steps until it is asked again; what paid most, see _best.
        self._asked_for: tuple[int, int] | None = None
        self._asked_left = 0
        self._found = 0, 0.0
        self._probe_s = self._plain_s = 0.0  # that the probe has cost; of a plain step

    def wanted(self, seqs: Seq[Sequence], n_rows: int) -> dict[Sequence, int]:
        """Which of the sequences should get guesses now, and how many: all, none, or one for a probe.

        Args:
            seqs: those that decode and leave it to the engine.
            n_rows: sequences that decode in all.
        """
        if not seqs or self._target.n_steps < FIRST_PLAIN:
            return {}
        if self._asked_left and not self._left and self._asked_for == (len(seqs), n_rows):
            self._asked_left -= 1
        else:
            self._found = self._best(seqs, n_rows)
            self.is_open = self._found[1] > MARGIN * n_rows / self._plain_s
            self._asked_for = len(seqs), n_rows
            open_steps = 1 if self._n_open < EARLY_ROUNDS else OPEN_STEPS
            self._asked_left = (open_steps if self.is_open else CLOSED_STEPS) - 1
        if not self.is_open:
            return self._probed(seqs)
        best, rate = self._found
        self._idle, self._left = 0, 0
        self._tries = self._n_full < FIRST_FULL and len(seqs) * self._most <= MANY_ROWS
        self._n_full += self._tries
        if rate == math.inf:
            return self._asked(seqs, self.max_tokens)
        self._n_open += 1
        if self._n_open % PLAIN_EVERY == 0:
            return {}
        if self._tries:
            best = self._most
        elif self._n_open % MORE_EVERY == 0:
            best *= 2
        return self._asked(seqs, best)

    def _asked(self, seqs: Seq[Sequence], n_guesses: int) -> dict[Sequence, int]:
        self._n_wanted = (
            min(n_guesses, self.max_tokens) if self._draft.depends_on_guesses else self.max_tokens
        )
        return dict.fromkeys(seqs, self._n_wanted)

    def _best(self, seqs: Seq[Sequence], n_rows: int) -> tuple[int, float]:
        """How many guesses of each sequence pay most, and tokens a second then; infinite where they cost nothing."""
        n_guesses = np.arange(1, self.max_tokens + 1)
        seconds = self._target.seconds(np.array([n_rows, *(n_rows + len(seqs) * n_guesses)]))
        self._plain_s = float(seconds[0])
        n_tokens = np.sum([self._reach(seq).values for seq in seqs], axis=0).cumsum() / len(seqs)
        draft_s = self._draft.seconds(len(seqs), n_guesses, 1 + n_tokens)
        if self._draft.is_known and draft_s[-1] < CHEAP * self._plain_s:
            return self.max_tokens, math.inf
        rates = (n_rows + len(seqs) * n_tokens) / (draft_s + seconds[1:])
        if self._cut is not None:
            n_verified, n_stood = len(seqs) * self._cut.verified.cumsum(), self._cut.stood.cumsum()
            seconds = self._target.seconds(n_rows + n_verified)
            draft_s = self._draft.seconds(len(seqs), n_guesses, 1 + n_stood)
            rates = np.maximum(rates, (n_rows + len(seqs) * n_stood) / (draft_s + seconds))
        best = int(rates.argmax())
        return best + 1, float(rates[best])

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
        # Whether the draft is as sure as it should be, those guesses tell that it doubts; and a probe is to learn.
        if self._tries or (self._left and not is_sure):
            return {seq: min(n, self._most) for seq, n in full.items()}
        owners = [(seq, i) for seq, n in full.items() for i in range(n)]
        if not owners:
            return full
        chances = {seq: self._chances(seq, proposals[seq]) for seq, n in full.items() if n}
        stand = np.concatenate(list(chances.values()))
        # Of one sequence none stands more probably than the one before.
        order = np.argsort(-stand, kind="stable")
        seconds = self._target.seconds(n_rows + np.arange(len(order) + 1))
        brought = n_rows + np.concatenate([[0.0], np.cumsum(stand[order])])
        most = np.array([max(full.values())])
        draft_s = self._draft.seconds(len(full), most, np.array([brought[-1] / n_rows]))
        best = int((brought / (draft_s + seconds)).argmax())
        counts = dict.fromkeys(full, 0)
        verified, stood = np.zeros((2, max(self._n_wanted, *full.values())))
        for i in order[:best].tolist():
            seq, position = owners[i]
            counts[seq] += 1
            verified[position] += 1
            stood[position] += stand[i]
        if is_sure:
            verified /= len(full)
            stood /= len(full)
            if self._cut is None:
                self._cut = _Cut(verified, stood, self.max_tokens)
            else:
                self._cut.add(verified, stood)
        for seq, chance in chances.items():
            self._reach(seq).expect(counts[seq], chance, self._n_wanted)
            self._all.expect(counts[seq], chance, self._n_wanted)
        return counts

    def drafted(self, n_seqs: int, n_passes: int, n_rows: int, seconds: float) -> None:
        """Guesses of n_seqs sequences took so long, in so many passes and rows of the drafter's model."""
        self._draft.observe(n_seqs, n_passes, n_rows, seconds)
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

    def _probed(self, seqs: Seq[Sequence]) -> dict[Sequence, int]:
        """While speculation loses: now and then the sequence that costs the least to read."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._interval = max(PROBE_EVERY, math.ceil(self._probe_s / (PROBE_SHARE * self._plain_s)))
                self._probe_s = 0.0
        else:
            self._idle += 1
            if self._idle >= self._interval:
                self._idle, self._left, self._most = 0, PROBE_ROUNDS, FIRST_GUESSES
                self.n_probes += 1
                for reach in (self._all, *self._own.values()):  # what was long ago shall not outweigh it
                    reach.n_rounds = min(reach.n_rounds, FEW_ROUNDS)
        if not self._left:
            return {}
        self._tries = self._left == PROBE_ROUNDS
        cheapest = min(seqs, key=lambda seq: seq.n_tokens)
        return self._asked([cheapest], self._most if self._tries else self.max_tokens)


def _tenth(confidence: float) -> int:
    return min(10, max(0, int(confidence * 10)))

"""Two drafters in one: a long repetition is guessed from the text, everything else by the draft model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pace.engine.sequence import Sequence
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.suffix import SuffixDrafter

__all__ = ["OVERRIDE", "HybridDrafter"]

OVERRIDE = 8
"""Tokens of a context from which on its guess is taken without asking the draft model."""


class HybridDrafter(Drafter):
    """Takes the guess of `suffix` where its context is long, and that of `model` elsewhere, or where `model` has none.

    A sequence whose guess comes from the text wants nothing of the model in that step, which then reads what was said in
    the meantime together with its next guess.

    Args:
        model: a drafter with a model.
        suffix: a drafter without one.
        override: tokens of a context from which on its guess needs no model.
    """

    name = "hybrid"

    def __init__(self, model: Drafter, suffix: SuffixDrafter, override: int = OVERRIDE) -> None:
        self.max_tokens = model.max_tokens
        self._model = model
        self._suffix = suffix
        self._override = override
        self._by_model: set[Sequence] = set()  # whose last proposal was the model's
        self._n_proposals = {"suffix": 0, model.name: 0}

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """As `Drafter.propose`."""
        guesses = self._suffix.guesses(wanted)
        sure = {seq for seq, guess in guesses.items() if guess.match >= self._override}
        proposals = self._model.propose({seq: 0 if seq in sure else n for seq, n in wanted.items()})
        self._by_model = {
            seq for seq, proposal in proposals.items() if proposal.token_ids and seq not in sure
        }
        for seq, guess in guesses.items():
            if seq not in self._by_model:
                proposals[seq] = Proposal(guess.token_ids, guess.confidences)
        self._n_proposals[self._model.name] += len(self._by_model)
        self._n_proposals["suffix"] += len(guesses.keys() - self._by_model)
        return proposals

    def observe(self, seq: Sequence, n_accepted: int) -> None:
        """As `Drafter.observe`: who made the proposal is told."""
        (self._model if seq in self._by_model else self._suffix).observe(seq, n_accepted)

    def end(self, seq: Sequence) -> None:
        """As `Drafter.end`."""
        self._by_model.discard(seq)
        self._model.end(seq)
        self._suffix.end(seq)

    def close(self) -> None:
        """As `Drafter.close`."""
        self._suffix.close()
        self._model.close()

    def stats(self) -> dict[str, Any]:
        """What both say; n_proposals: how many came from whom."""
        return self._model.stats() | self._suffix.stats() | {"n_proposals": dict(self._n_proposals)}

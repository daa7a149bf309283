"""Two drafters in one: what repeats is guessed from the text, everything else by the draft model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from operator import mul
from typing import Any

import numpy.typing as npt

from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.models.plan import Plan
from pace.speculative.controller import Controller
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.suffix import SuffixDrafter

__all__ = ["HybridDrafter"]

MEMORY = 0.9
"""What earlier rounds count after each further one: about the last ten matter."""


class Record:
    """How many tokens a drafter gets right, by something.

    Args:
        rate: what is thought before anything is known; it counts as two rounds.
    """

    __slots__ = ("of", "right")

    def __init__(self, rate: float) -> None:
        self.right, self.of = 2.0 * rate, 2.0

    def add(self, right: float, of: float) -> None:
        """A round."""
        self.right = MEMORY * self.right + right
        self.of = MEMORY * self.of + of

    @property
    def rate(self) -> float:
        """Of late."""
        return self.right / self.of


class Choice:
    """Of one sequence: what is known of both drafters, and whose guess is being verified.

    Args:
        model: right tokens of a guess of the model.
        trust: right tokens of the text's guesses, by those that they promise.
    """

    __slots__ = ("by_model", "confidences", "model", "trust")

    def __init__(self, model: float, trust: float) -> None:
        self.model = Record(model)
        self.trust = Record(trust)
        self.by_model = False
        self.confidences: list[float] = []  # of the text's guess


class HybridDrafter(Drafter):
    """Takes the guess of `suffix` where it promises as many right tokens as the model's have had of late, and that of
    `model` elsewhere. What the text promises is corrected by what it has kept. So a long match overrides the model, and how
    long it must be depends on how good the model is for this sequence.

    A sequence whose guess comes from the text wants nothing of the model in that step, which then reads what was said in
    the meantime together with its next guess. Whether the model's passes pay is decided here, by itself: where they don't,
    the text still guesses, which costs nothing.

    Args:
        model: a drafter with a model.
        suffix: a drafter without one.
        gate: decides whom the model is asked for, of those that leave it to the engine; None: for all that want guesses.
    """

    name = "hybrid"

    def __init__(self, model: Drafter, suffix: SuffixDrafter, gate: Controller | None = None) -> None:
        self.max_tokens = model.max_tokens
        self._gate = gate
        self._model = model
        self._suffix = suffix
        self._choices: dict[Sequence, Choice] = {}
        # Of all sequences, where one begins. At first a third of a model's guess is thought right, and 0.8 of a promise.
        self._usual = Choice(model.max_tokens / 3, 0.8)
        self._n_proposals = {"suffix": 0, model.name: 0}

    @property
    def plan(self) -> Plan | None:
        """See `Drafter.plan`."""
        return self._model.plan

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """See `Drafter.bind`."""
        self._model.bind(slot)

    def ran(self, step: Schedule) -> None:
        """See `Drafter.ran`."""
        self._model.ran(step)

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """As `Drafter.propose`."""
        guesses = self._suffix.guesses(wanted)
        asked = dict(wanted)
        for seq, guess in guesses.items():
            choice = self._choice(seq)
            choice.by_model, choice.confidences = False, guess.confidences
            if guess.expected * choice.trust.rate >= choice.model.rate:
                asked[seq] = 0
        by_model = self._ask_model(asked)
        for seq in by_model:
            self._choice(seq).by_model = True
        by_text = {
            seq: Proposal(guess.token_ids, guess.confidences)
            for seq, guess in guesses.items()
            if seq not in by_model
        }
        self._n_proposals[self._model.name] += len(by_model)
        self._n_proposals["suffix"] += len(by_text)
        return by_model | by_text

    def _ask_model(self, asked: dict[Sequence, int]) -> dict[Sequence, Proposal]:
        """The model's guesses, as far as they pay."""
        begin = time.perf_counter()
        self.decided_s = 0.0
        gate = self._gate
        n_rows = sum(n > 0 for n in asked.values())
        auto = [seq for seq, n in asked.items() if n and isinstance(seq.params.speculative, str)]
        if gate is not None:
            paying = dict.fromkeys(auto, 0) | gate.wanted(auto, n_rows)
            asked = {seq: min(n, paying.get(seq, n)) for seq, n in asked.items()}
            if not gate.is_open and not any(asked.values()):
                return {}  # it reads no prompts either
        start, before = time.perf_counter(), self._model.n_run
        proposals = {
            seq: proposal
            for seq, proposal in self._model.propose(asked).items()
            if asked[seq] and proposal.token_ids
        }
        if gate is not None:
            seconds = time.perf_counter() - start
            if proposals:
                n_passes, n_draft_rows = (
                    now - then for now, then in zip(self._model.n_run, before, strict=True)
                )
                gate.drafted(len(proposals), n_passes, n_draft_rows, seconds)
            paid = gate.cut({seq: proposals[seq] for seq in auto if seq in proposals}, n_rows)
            for seq, n in paid.items():
                if n:
                    proposals[seq] = proposals[seq].first(n)
                else:
                    del proposals[seq]
            self.decided_s = time.perf_counter() - begin
        return proposals

    def _choice(self, seq: Sequence) -> Choice:
        choice = self._choices.get(seq)
        if choice is None:
            choice = self._choices[seq] = Choice(self._usual.model.rate, self._usual.trust.rate)
        return choice

    def observe(self, seq: Sequence, n_verified: int, n_accepted: int) -> None:
        """As `Drafter.observe`: who made the proposal is told."""
        choice = self._choice(seq)
        promised = sum(accumulate(choice.confidences[:n_verified], mul))
        for one in (choice, self._usual):
            if choice.by_model:
                one.model.add(n_accepted, 1)
            else:
                one.trust.add(n_accepted, promised)
        if choice.by_model and self._gate is not None:
            self._gate.verified(seq, n_verified, n_accepted)
        (self._model if choice.by_model else self._suffix).observe(seq, n_verified, n_accepted)

    def end(self, seq: Sequence) -> None:
        """As `Drafter.end`."""
        self._choices.pop(seq, None)
        if self._gate is not None:
            self._gate.end(seq)
        self._model.end(seq)
        self._suffix.end(seq)

    def close(self) -> None:
        """As `Drafter.close`."""
        self._choices.clear()
        self._suffix.close()
        self._model.close()

    def stats(self) -> dict[str, Any]:
        """What both say; n_proposals: how many came from whom; model_pays: whether the model is asked."""
        own = {
            "n_proposals": dict(self._n_proposals),
            "model_pays": self._gate is None or self._gate.is_open,
        }
        return self._model.stats() | self._suffix.stats() | own

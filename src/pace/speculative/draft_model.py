"""A draft model that guesses token by token: any smaller model of the target's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pace.engine.sequence import Sequence
from pace.models.plan import Plan
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.reader import DraftReader, Part, Reading

__all__ = ["ModelDrafter"]


class ModelDrafter(Drafter):
    """K passes a step: the first one reads what is new, each further one the last guess of every sequence.

    A guess that is accepted is a token of the sequence, in the draft's cache already, and is not read again.

    Args:
        reader: runs the draft.
        max_tokens: K.
    """

    name = "draft_model"
    passes = "many"

    def __init__(self, reader: DraftReader, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._reader = reader
        self._fed: dict[Sequence, tuple[Reading, int]] = {}  # how many of the last guesses are in the cache

    @property
    def plan(self) -> Plan:
        """See `Drafter.plan`."""
        return self._reader.ir

    @property
    def n_run(self) -> tuple[int, int]:
        """See `Drafter.n_run`."""
        return self._reader.n_passes, self._reader.n_rows

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """Guesses of those whose tokens the draft has read; see `Drafter.propose`."""
        reader = self._reader
        self._fed.clear()
        parts = reader.plan(wanted, None)
        if not parts:
            return {}
        tokens, confidences = reader.run(parts)
        asked = [part.reading for part in parts if part.n_logits]
        guesses = {
            reading: ([token], [confidence])
            for reading, token, confidence in zip(asked, tokens, confidences, strict=True)
        }
        for i in range(1, self.max_tokens):
            parts = [
                part
                for reading in asked
                if wanted[reading.seq] > i and len(guesses[reading][0]) == i <= reader.room(reading)
                for part in [Part(reading, reading.n_read + i - 1, 0, guesses[reading][0][-1:], 1)]
                if reader.extend(part)
            ]
            if not parts:
                break
            tokens, confidences = reader.run(parts)
            for part, token, confidence in zip(parts, tokens, confidences, strict=True):
                guesses[part.reading][0].append(token)
                guesses[part.reading][1].append(confidence)
                self._fed[part.reading.seq] = part.reading, i
        return {reading.seq: Proposal(*guess) for reading, guess in guesses.items()}

    def observe(self, seq: Sequence, n_verified: int, n_accepted: int) -> None:
        """The guesses that were right need not be read again; see `Drafter.observe`."""
        if seq in self._fed:
            reading, n_fed = self._fed.pop(seq)
            if n_accepted:
                self._reader.advance(reading, min(n_accepted, n_fed))

    def end(self, seq: Sequence) -> None:
        """See `Drafter.end`."""
        self._fed.pop(seq, None)
        self._reader.end(seq)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._reader.close()

    def stats(self) -> dict[str, Any]:
        """Passes and rows of the draft."""
        return {"n_draft_passes": self._reader.n_passes, "n_draft_rows": self._reader.n_rows}

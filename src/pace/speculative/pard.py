"""PARD: a draft model that guesses K tokens in one pass.

The draft reads what was committed since its last pass and K - 1 mask tokens behind it, under the usual causal mask and at
the usual positions. The row of the last token predicts the next one, that of the j-th mask the one j further. The masks'
keys and values are dropped; accepted guesses were never in the draft's cache as tokens, and are read with the next pass. So
nothing that is not verified is ever kept, and no pass depends on what became of a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.models.plan import Plan
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.reader import DraftReader

__all__ = ["PardDrafter"]


class PardDrafter(Drafter):
    """One ragged pass a step over all sequences: those that decode, and prompts as the target reads them.

    Args:
        reader: runs the draft; its `never` is the mask.
        mask_id: the mask token.
        max_tokens: K.
    """

    name = "pard"
    passes = "one"

    def __init__(self, reader: DraftReader, mask_id: int, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._reader = reader
        self._mask_id = mask_id

    @property
    def plan(self) -> Plan:
        """See `Drafter.plan`."""
        return self._reader.ir

    @property
    def n_run(self) -> tuple[int, int]:
        """See `Drafter.n_run`."""
        return self._reader.n_passes, self._reader.n_rows

    def bind(self, slot: Callable[[str], npt.NDArray[Any]]) -> None:
        """See `Drafter.bind`."""
        if self._reader.features is not None:
            self._reader.features.bind(slot)

    def ran(self, step: Schedule) -> None:
        """See `Drafter.ran`."""
        if self._reader.features is not None:
            self._reader.features.ran(step)

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        """Guesses of those whose tokens the draft has read up to the last one; see `Drafter.propose`."""
        parts = self._reader.plan(wanted, self._mask_id)
        if not parts:
            return {}
        tokens, confidences = self._reader.run(parts)
        proposals, at = {}, 0
        for part in parts:
            end = at + part.n_logits
            if part.n_logits:
                proposals[part.reading.seq] = Proposal(tokens[at:end], confidences[at:end])
            at = end
        return proposals

    def end(self, seq: Sequence) -> None:
        """See `Drafter.end`."""
        self._reader.end(seq)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._reader.close()

    def stats(self) -> dict[str, Any]:
        """Passes and rows of the draft."""
        return {"n_draft_passes": self._reader.n_passes, "n_draft_rows": self._reader.n_rows}

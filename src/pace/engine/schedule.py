"""What runs in one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pace.engine.sequence import Sequence

__all__ = ["Schedule"]


@dataclass(slots=True)
class Schedule:
    """One step: sequences with the number of their pending tokens to run, decoding ones first.

    Attributes:
        seqs: in the order of the batch.
        n_new: rows of each, >= 1: pending tokens, and drafted ones behind them.
        n_tokens: sum of n_new.
        n_decode: leading sequences that run their only pending token.
        n_draft: rows of drafted tokens; theirs.
        admitted: those of seqs that run for the first time since they were started.
    """

    seqs: list[Sequence] = field(default_factory=list)
    n_new: list[int] = field(default_factory=list)
    n_tokens: int = 0
    n_decode: int = 0
    n_draft: int = 0
    admitted: list[Sequence] = field(default_factory=list)

    def add(self, seq: Sequence, n_new: int) -> None:
        """Run the next `n_new` pending tokens of a sequence."""
        self.seqs.append(seq)
        self.n_new.append(n_new)
        self.n_tokens += n_new

    def draft(self, i: int, n_draft: int) -> None:
        """Run drafted tokens beside the pending one of the i-th sequence."""
        self.n_new[i] += n_draft
        self.n_tokens += n_draft
        self.n_draft += n_draft

    @property
    def n_prompt(self) -> int:
        """Rows that read prompts."""
        return self.n_tokens - self.n_decode - self.n_draft

    def split(self) -> Iterator[Schedule]:
        """The same step as one step per sequence, without the drafts: the fault may be theirs."""
        for i, (seq, n_new) in enumerate(zip(self.seqs, self.n_new, strict=True)):
            n_new -= seq.n_draft
            seq.n_draft = 0
            admitted = [seq] if seq in self.admitted else []
            yield Schedule([seq], [n_new], n_new, int(i < self.n_decode), admitted=admitted)

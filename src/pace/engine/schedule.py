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
        n_new: tokens of each, >= 1.
        n_tokens: sum of n_new.
        n_decode: leading sequences that run their only pending token.
        admitted: those of seqs that run for the first time since they were started.
    """

    seqs: list[Sequence] = field(default_factory=list)
    n_new: list[int] = field(default_factory=list)
    n_tokens: int = 0
    n_decode: int = 0
    admitted: list[Sequence] = field(default_factory=list)

    def add(self, seq: Sequence, n_new: int) -> None:
        """Run the next `n_new` pending tokens of a sequence."""
        self.seqs.append(seq)
        self.n_new.append(n_new)
        self.n_tokens += n_new

    def split(self) -> Iterator[Schedule]:
        """The same step as one step per sequence."""
        for i, (seq, n_new) in enumerate(zip(self.seqs, self.n_new, strict=True)):
            yield Schedule(
                [seq], [n_new], n_new, int(i < self.n_decode), [seq] if seq in self.admitted else []
            )

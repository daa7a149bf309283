"""Who runs in the next step, and with how many tokens."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from pace.engine.sequence import NO_ROW, Sequence, Status
from pace.kvcache import BlockTables

__all__ = ["Schedule", "Scheduler"]


@dataclass(slots=True)
class Schedule:
    """One step: sequences with the number of their pending tokens to run, decoding ones first.

    Attributes:
        seqs: in the order of the batch.
        n_new: tokens of each, >= 1.
        n_tokens: sum of n_new.
        admitted: those of seqs that run for the first time.
    """

    seqs: list[Sequence] = field(default_factory=list)
    n_new: list[int] = field(default_factory=list)
    n_tokens: int = 0
    admitted: list[Sequence] = field(default_factory=list)

    def add(self, seq: Sequence, n_new: int) -> None:
        """Run the next `n_new` pending tokens of a sequence."""
        self.seqs.append(seq)
        self.n_new.append(n_new)
        self.n_tokens += n_new


class Scheduler:
    """First come, first served, under a budget of tokens per step.

    Decoding sequences run in every step, one row each, so that nobody's stream stops while a prompt is
    read; what is left of the budget goes to prompts in order of arrival, the last one cut to fit. A
    sequence is admitted when its worst case fits the KV pool, so nothing has to be taken back later; the
    head of the queue is never overtaken.

    Args:
        tables: block tables; their rows bound the running sequences.
        max_num_batched_tokens: rows of one step, at least as many as the tables have.
    """

    def __init__(self, tables: BlockTables, max_num_batched_tokens: int) -> None:
        self.tables = tables
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Free what a finished sequence holds. One that still waits is dropped when its turn comes."""
        if seq.row != NO_ROW:
            self.running.remove(seq)
            self.tables.close(seq.row)
            seq.row = NO_ROW

    def schedule(self) -> Schedule:
        """Choose the next step; empty only where nothing waits or runs."""
        step = Schedule()
        budget = self.max_num_batched_tokens
        prompts = []
        for seq in self.running:
            n_pending = seq.n_tokens - seq.n_computed
            if n_pending == 1:
                step.add(seq, 1)
            else:
                prompts.append((seq, n_pending))
        for seq, n_pending in prompts:
            n_new = min(n_pending, budget - step.n_tokens)
            if n_new == 0:
                break
            step.add(seq, n_new)
        while self.waiting and step.n_tokens < budget:
            seq = self.waiting[0]
            if seq.status is Status.WAITING:
                row = self.tables.open(seq.max_cached)
                if row is None:
                    break
                seq.start(row, time.monotonic())
                self.running.append(seq)
                step.admitted.append(seq)
                step.add(seq, min(seq.n_tokens, budget - step.n_tokens))
            self.waiting.popleft()
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            self.tables.extend(seq.row, seq.n_computed + n_new)
        return step

"""Who runs in the next step, and with how many tokens."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from pace.engine.pacing import Pacer
from pace.engine.sequence import NO_ROW, Sequence, Status
from pace.kvcache import KVTables, Reuse, blocks_for

__all__ = ["Schedule", "Scheduler"]

HOLD_TOKENS = 64
"""Shared tokens for which a sequence waits until the one that is computing them has done so. Fewer are computed again:
that costs less than a step of waiting."""

_key = attrgetter("key")


@dataclass(slots=True)
class Schedule:
    """One step: sequences with the number of their pending tokens to run, decoding ones first.

    Attributes:
        seqs: in the order of the batch.
        n_new: tokens of each, >= 1.
        n_tokens: sum of n_new.
        n_decode: leading sequences that run their only pending token.
        admitted: those of seqs that start with this step.
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


class Scheduler:
    """Priority, then first come, first served, under a budget of tokens per step.

    Decoding sequences run in every step, one row each, so that nobody's stream stops while a prompt is read; what is
    left of the budget goes to prompts in order, the last one cut to fit. While somebody watches tokens arrive, `Pacer`
    lowers the budget to what keeps the gaps short. The head of the queue is never overtaken.

    Memory is handed out in one of two ways. With `reserve`, a sequence starts when its longest possible output fits, and
    nothing has to be taken back. Otherwise it starts when its prompt fits; when blocks run out, the last of the running
    sequences gives its own back, waits, and computes its tokens again later: the same tokens, by law 1.

    A sequence whose prompt begins like one that is being computed right now waits for it rather than computing the same.

    Args:
        tables: block tables; their rows bound the running sequences.
        max_num_batched_tokens: rows of one step, at least as many as the tables have.
        reserve: see above.
        prefix_caching: look for computed prompts.
        windowed: every layer has a window, so blocks behind it can be freed.
    """

    def __init__(
        self,
        tables: KVTables,
        max_num_batched_tokens: int,
        *,
        reserve: bool = False,
        prefix_caching: bool = True,
        windowed: bool = False,
    ) -> None:
        self.tables = tables
        self.max_num_batched_tokens = max_num_batched_tokens
        self.reserve = reserve
        self.prefix_caching = prefix_caching
        self.windowed = windowed
        self.pacer = Pacer()
        self.running: list[Sequence] = []  # by key: the first is the last to be preempted
        self.n_waiting = 0
        self.n_preemptions = 0
        self._waiting: list[
            tuple[tuple[int, int, int], Sequence]
        ] = []  # heap; finished ones are dropped on the way
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and how many blocks there were

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        heapq.heappush(self._waiting, (seq.key, seq))
        self.n_waiting += 1

    def remove(self, seq: Sequence, *, forget: bool = False) -> None:
        """Free what a sequence that is about to finish holds.

        Args:
            forget: what it computed must not be reused.
        """
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            # Its last tokens stay in the cache for a follow-up, until their blocks are needed.
            tokens = None if forget else seq.tokens[: seq.n_computed]
            self.tables.close(seq.row, tokens, forget=forget)
            seq.row = NO_ROW
        elif seq.status is Status.WAITING:
            self.n_waiting -= 1
        self._blocked = None

    def schedule(self) -> Schedule:
        """Choose the next step; empty only where nothing waits or runs."""
        step = Schedule()
        prompts, is_watched = self._decode(step)
        budget = self.max_num_batched_tokens
        if is_watched:
            budget = min(budget, step.n_decode + self.pacer.allowance(step.n_decode))
        for seq in prompts:
            n_new = min(seq.n_tokens - seq.n_computed, budget - step.n_tokens)
            if n_new == 0:
                break
            step.add(seq, n_new)
        while self._waiting and step.n_tokens < budget:
            seq = self._waiting[0][1]
            if seq.status is Status.WAITING:
                if not self._admit(seq):
                    break
                step.admitted.append(seq)
                step.add(seq, min(seq.n_tokens - seq.n_computed, budget - step.n_tokens))
            heapq.heappop(self._waiting)
        return step

    def ran(self, step: Schedule) -> None:
        """The step has run: its tokens are in the cache."""
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            n_before = seq.n_computed
            n_computed = n_before + n_new
            seq.n_computed = n_computed
            self.tables.commit(seq.row, seq.tokens, n_computed)
            if n_before < seq.n_prompt <= n_computed:
                # Others can begin where this prompt ends, though its last block is not full.
                self.tables.remember_tail(seq.row, seq.tokens, seq.n_prompt)
            if self.windowed:
                self.tables.release_before(seq.row, n_computed)

    def _decode(self, step: Schedule) -> tuple[list[Sequence], bool]:
        """Add a row for every decoding sequence; returns those that still read, and whether anybody watches."""
        prompts = []
        is_watched = False
        at = 0
        running = self.running
        while at < len(running):  # preemption shortens the list from its end
            seq = running[at]
            at += 1
            if seq.n_tokens - seq.n_computed > 1:
                prompts.append(seq)
            elif self._extend(seq):
                step.add(seq, 1)
                is_watched = is_watched or seq.watched
        step.n_decode = step.n_tokens
        # One of them may have been preempted by a decoding sequence that comes before it.
        return [seq for seq in prompts if seq.status is Status.RUNNING], is_watched

    def _extend(self, seq: Sequence) -> bool:
        """Make room for the pending token; False where `seq` itself had to give way."""
        while not self.tables.extend(seq.row, seq.n_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.tables.close(seq.row, seq.tokens[: seq.n_computed])
        seq.preempt()
        self.add(seq)
        self.n_preemptions += 1
        self._blocked = None

    def _admit(self, seq: Sequence) -> bool:
        """Start the head of the queue, if it fits."""
        tables = self.tables
        if tables.n_open == len(tables.array) or self._blocked == (seq, tables.n_available):
            return False
        reuse = self._find(seq)
        if self._is_computed_now(seq, 0 if reuse is None else reuse.n_tokens):
            return False
        row = None
        if self.reserve:
            row = tables.open(seq.max_cached, reuse, seq.cache_salt)
        elif tables.fits(seq.n_tokens, self._headroom(), reuse):
            row = tables.open(0, reuse, seq.cache_salt)
        if row is None or not tables.extend(row, seq.n_tokens):
            if row is not None:
                tables.close(row)
            self._blocked = (seq, tables.n_available)
            return False
        seq.start(row, 0 if reuse is None else reuse.n_tokens)
        self.n_waiting -= 1
        insort(self.running, seq, key=_key)
        return True

    def _headroom(self) -> int:
        """Blocks to spare when a sequence starts: one for each that may need another, or it would be preempted at once."""
        size = self.tables.block_size
        n_growing = sum(
            blocks_for(seq.max_cached, size) > blocks_for(seq.n_tokens, size) for seq in self.running
        )
        return min(n_growing, self.tables.n_blocks // 8)

    def _find(self, seq: Sequence) -> Reuse | None:
        """What of a sequence is in the cache; its last token always runs, as somebody must make the logits."""
        if not seq.is_scored:
            return None
        limit = seq.n_tokens - 1
        if limit == 0:
            return None
        reuse = (
            self.tables.match(seq.tokens[: seq.n_tokens], seq.cache_salt, limit)
            if self.prefix_caching
            else None
        )
        if seq.index and (reuse is None or reuse.n_tokens < seq.n_prompt - 1):
            for other in self.running:  # another completion of the same prompt
                if other.request_id == seq.request_id and other.n_computed >= seq.n_prompt - 1:
                    return self.tables.fork(other.row, seq.n_prompt - 1) or reuse
        return reuse

    def _is_computed_now(self, seq: Sequence, n_known: int) -> bool:
        """Whether a running sequence is about to compute much of what this one needs beyond `n_known` tokens."""
        if not seq.is_scored:
            return False
        most = seq.n_tokens - 1
        last = n_known + HOLD_TOKENS - 1  # of the tokens that must be shared; a look at one mostly tells
        if last >= most:
            return False
        token = seq.tokens[last]
        return any(
            other.n_tokens - other.n_computed > 1
            and other.n_tokens > last
            and other.tokens[last] == token
            and (other.request_id == seq.request_id or self._will_be_found(other, seq, n_known))
            and _common_prefix(seq, other) > last
            for other in self.running
        )

    def _will_be_found(self, other: Sequence, seq: Sequence, n_known: int) -> bool:
        """Whether `match` will find for one sequence what another is about to compute behind their first n_known tokens.

        Not where the index has lost a block of what the other has computed already: nothing is found behind a gap.
        """
        size = self.tables.block_size
        return (
            self.prefix_caching
            and other.cache_salt == seq.cache_salt
            and other.n_computed // size * size <= n_known
        )


def _common_prefix(a: Sequence, b: Sequence) -> int:
    """Leading tokens that two sequences share."""
    n = min(a.n_tokens, b.n_tokens)
    differ = a.tokens[:n] != b.tokens[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n

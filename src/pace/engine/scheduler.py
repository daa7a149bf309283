"""Who runs in the next step, and with how many tokens."""

from __future__ import annotations

from bisect import insort
from enum import Enum, auto
from operator import attrgetter

from pace.engine.pacing import Pacer
from pace.engine.queue import WaitingQueue
from pace.engine.schedule import Schedule
from pace.engine.sequence import NO_ROW, Sequence, Status
from pace.kvcache import KVTables, Reuse

__all__ = ["Scheduler"]

HOLD_TOKENS = 64
"""Shared tokens for which a sequence waits until the one that is computing them has done so. Fewer are computed again:
that costs less than a step of waiting."""

_key = attrgetter("key")


def _n_pending(seq: Sequence) -> int:
    return seq.n_tokens - seq.n_computed


class _Admission(Enum):
    """What became of a sequence that might start."""

    STARTED = auto()
    HELD = auto()  # until somebody else has computed what it needs
    NO_ROOM = auto()  # rows or blocks are short


class Scheduler:
    """Priority, then first come, first served, under a budget of tokens per step.

    Decoding sequences run in every step, one row each, so that nobody's stream stops while a prompt is read. What is
    left of the budget, the step's *room*, goes to prompts by (priority, arrival), whether they have started or wait. Of
    the one for which it does not suffice, prompts of the same priority that are less than half as long may pass, the
    shortest first; together they get half of the rest at most. (A prompt of a that is passed by one of b < a tokens ends
    b later, the other one a - b sooner, when each has half: that pays from a = 2 b on.) While somebody watches tokens
    arrive, `Pacer` lowers the budget to what keeps the gaps short.

    So in every step at least half of the room goes to prompts in order, and all of it while the first one's priority is
    better than any other's. Beside a prompt that is read to its end, those of a worse priority get no more rows than the
    step has without them: full steps would let it wait for 2000 of their tokens. Rows and blocks are handed out in order
    too: whoever passes leaves room for the head of the queue, and while that does not fit, nobody else starts.

    Memory is handed out in one of two ways. With `reserve`, a sequence starts when its longest possible output fits, and
    nothing has to be taken back. Otherwise it starts when its prompt fits; when blocks run out, or the head of the queue
    comes before sequences that run, the last of the running ones gives its own back, waits, and computes its tokens
    again later: the same tokens, by law 1.

    A sequence whose prompt begins like one that is being computed right now waits for it rather than computing the same,
    unless the other's priority is worse.

    Args:
        tables: block tables; their rows bound the running sequences.
        max_num_batched_tokens: rows of one step, at least as many as the tables have.
        reserve: see above.
        prefix_caching: look for computed prompts.
        max_draft_rows: drafted tokens of one step; 0: nobody speculates.
    """

    def __init__(
        self,
        tables: KVTables,
        max_num_batched_tokens: int,
        *,
        reserve: bool = False,
        prefix_caching: bool = True,
        max_draft_rows: int = 0,
    ) -> None:
        self.max_draft_rows = max_draft_rows
        self.tables = tables
        self.max_num_batched_tokens = max_num_batched_tokens
        self.reserve = reserve
        self.prefix_caching = prefix_caching
        self.pacer = Pacer()
        self.running: list[Sequence] = []  # by key: the first is the last to be preempted
        self.n_preemptions = 0
        self._queue = WaitingQueue()
        self._fresh: set[Sequence] = set()  # started, and has not run since
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and how many blocks there were

    @property
    def n_waiting(self) -> int:
        """Sequences that have not started, preempted ones included."""
        return len(self._queue)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._queue.add(seq)

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
            self._fresh.discard(seq)
        else:
            self._queue.discard(seq)
        self._blocked = None

    def schedule(self) -> Schedule:
        """Choose the next step; empty only where nothing waits or runs."""
        step = Schedule()
        if self._queue and not self.reserve:
            self._make_way()
        prompts, is_watched = self._decode(step)
        budget = self.max_num_batched_tokens
        if self.max_draft_rows:
            self._draft(step, bool(prompts or self._queue))
        if is_watched:
            n_rows = step.n_tokens
            n_waiting = len(prompts) + len(self._queue)
            budget = min(budget, n_rows + self.pacer.allowance(n_rows, n_waiting))
        if prompts or self._queue:
            self._read(step, prompts, budget - step.n_tokens)
        if self._fresh:
            step.admitted = [seq for seq in step.seqs if seq in self._fresh]
        return step

    def ran(self, step: Schedule) -> None:
        """The step has run: its tokens are in the cache."""
        has_reach = self.tables.has_reach
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            n_before = seq.n_computed
            n_computed = (
                n_before + n_new - seq.n_draft
            )  # which of the guesses are right, `Sequence.commit` will say
            seq.n_computed = n_computed
            self.tables.commit(seq.row, seq.tokens, n_computed)
            if n_before < seq.n_prompt <= n_computed:
                # Others can begin where this prompt ends, though its last block is not full.
                self.tables.remember_tail(seq.row, seq.tokens, seq.n_prompt)
            if has_reach:
                self.tables.release_before(seq.row, n_computed)
        self._fresh.difference_update(step.admitted)

    def _decode(self, step: Schedule) -> tuple[list[Sequence], bool]:
        """Add a row for every decoding sequence; returns those that still read, and whether anybody watches."""
        prompts = []
        is_watched = False
        at = 0
        running = self.running
        while at < len(running):  # preemption shortens the list from its end
            seq = running[at]
            at += 1
            if seq.n_tokens - seq.n_computed > 1 or seq.pool is not None:
                prompts.append(seq)
            elif self._extend(seq):
                step.add(seq, 1)
                is_watched = is_watched or seq.watched
        step.n_decode = step.n_tokens
        # One of them may have been preempted by a decoding sequence that comes before it.
        return [seq for seq in prompts if seq.status is Status.RUNNING], is_watched

    def _draft(self, step: Schedule, shares: bool) -> None:
        """Add the guesses of the decoding sequences, as far as rows and free blocks go; nobody gives way to a guess.

        Args:
            shares: prompts wait for rows too: half of what decoding leaves is theirs.
        """
        room = self.max_num_batched_tokens - step.n_decode
        room = min(self.max_draft_rows, room // 2 if shares else room)
        for i, seq in enumerate(step.seqs):
            if seq.n_draft:
                end = min(seq.n_tokens + min(seq.n_draft, room), self.tables.step_end(seq.n_computed))
                seq.n_draft = end - seq.n_tokens if self.tables.extend(seq.row, end) else 0
                step.draft(i, seq.n_draft)
                room -= seq.n_draft

    def restart(self, seq: Sequence) -> None:
        """What a running sequence has in the cache can't be trusted: it waits, and computes all of it again."""
        self._preempt(seq, forget=True)

    def _extend(self, seq: Sequence) -> bool:
        """Make room for the pending token; False where `seq` itself had to give way."""
        while not self.tables.extend(seq.row, seq.n_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, *, forget: bool = False) -> None:
        self.running.remove(seq)
        self.tables.close(seq.row, None if forget else seq.tokens[: seq.n_computed], forget=forget)
        seq.preempt()
        self._fresh.discard(seq)
        self.add(seq)
        self.n_preemptions += 1
        self._blocked = None

    def _make_way(self) -> None:
        """Start those at the head of the queue that come before sequences that run, at the cost of these."""
        room = self.max_num_batched_tokens
        while room > 0 and self.running:
            head = self._queue.head()
            if head is None or head.key > self.running[-1].key:
                return
            admission = self._admit(head)
            if admission is _Admission.STARTED:
                room -= _n_pending(head)
            elif admission is _Admission.HELD or not self._would_fit(head):
                return
            else:
                self._preempt(self.running[-1])

    def _would_fit(self, head: Sequence) -> bool:
        """Whether the running sequences that come after `head` hold enough for it."""
        after = [seq.n_tokens for seq in self.running if seq.key > head.key]
        return bool(after) and self.tables.has_room([head.n_tokens], after)

    def _read(self, step: Schedule, prompts: list[Sequence], room: int) -> None:
        """Give `room` rows to prompts in order, those in the queue among them.

        Args:
            prompts: running ones, by key.
        """
        is_open = has_room = True  # whether the queue's head may start; whether anybody in it may
        best: int | None = None  # priority of the first one, until a worse one follows
        at = 0
        while room > 0:
            seq = prompts[at] if at < len(prompts) else None
            head = self._queue.head() if is_open else None
            if head is not None and (seq is None or head.key < seq.key):
                admission = self._admit(head)
                if admission is not _Admission.STARTED:
                    is_open, has_room = False, admission is _Admission.HELD
                    continue
                seq = head
            elif seq is not None:
                at += 1
            else:
                return
            if best is None and not step.n_prompt:
                best = seq.priority
            elif best is not None and seq.priority > best:
                # A step takes at most twice as long as without them.
                best, room = None, min(room, step.n_tokens)
            n_new = self._n_next(seq)
            if n_new > room:
                self._add(step, seq, room - self._pass(step, seq, prompts[at:], room // 2, has_room))
                return
            self._add(step, seq, n_new)
            room -= n_new

    def _n_next(self, seq: Sequence) -> int:
        """Pending tokens that one step may run: layers that see a part of the sequence hold no more of it at once."""
        return min(seq.n_tokens, self.tables.step_end(seq.n_computed)) - seq.n_computed

    def _add(self, step: Schedule, seq: Sequence, n_new: int) -> None:
        """Run tokens of a prompt, for all of which there are blocks since it was admitted."""
        if not self.tables.extend(seq.row, seq.n_computed + n_new):
            raise RuntimeError(
                f"{n_new} tokens of {seq.request_id} do not fit, though its prompt was promised room"
            )
        step.add(seq, n_new)

    def _pass(self, step: Schedule, long: Sequence, behind: list[Sequence], room: int, has_room: bool) -> int:
        """Give up to `room` rows to prompts that are less than half as long as `long`, for which the step's don't suffice.

        Args:
            behind: running prompts that come after it.
            has_room: somebody from the queue may start.

        Returns:
            Rows given.
        """
        most = (_n_pending(long) - 1) // 2
        short = [seq for seq in behind if seq.priority == long.priority and _n_pending(seq) <= most]
        short.sort(key=_n_pending, reverse=True)
        left = room
        while left > 0:
            queued = self._queue.shortest() if has_room else None
            if (
                queued is not None
                and queued.priority == long.priority
                and queued.n_tokens <= min(most, _n_pending(short[-1]) if short else most)
            ):
                has_room = self._may_pass(queued) and self._admit(queued) is _Admission.STARTED
                if not has_room:
                    continue
                seq = queued
            elif short:
                seq = short.pop()
            else:
                break
            n_new = min(self._n_next(seq), left)
            self._add(step, seq, n_new)
            left -= n_new
        return room - left

    def _may_pass(self, seq: Sequence) -> bool:
        """Whether a row and blocks for the head of the queue are left when `seq`, further behind, starts."""
        tables, head = self.tables, self._queue.head()
        if head is None or seq is head:
            return True
        need = [one.max_cached if self.reserve else one.n_tokens for one in (seq, head)]
        return tables.n_open + 2 <= tables.n_rows and tables.has_room(need)

    def _admit(self, seq: Sequence) -> _Admission:
        """Start a sequence from the queue, if it fits."""
        tables = self.tables
        if tables.n_open == tables.n_rows or self._blocked == (seq, tables.n_available):
            return _Admission.NO_ROOM
        reuse = self._find(seq)
        if self._is_computed_now(seq, 0 if reuse is None else reuse.n_tokens):
            return _Admission.HELD
        row = None
        if self.reserve:
            row = tables.open(seq.max_cached, reuse, seq.cache_salt)
        elif tables.fits(seq.n_tokens, self._growing(), reuse):
            row = tables.open(seq.n_tokens, reuse, seq.cache_salt)
        if row is None:
            self._blocked = (seq, tables.n_available)
            return _Admission.NO_ROOM
        self._queue.discard(seq)
        seq.start(row, 0 if reuse is None else reuse.n_tokens)
        self._fresh.add(seq)
        insort(self.running, seq, key=_key)
        return _Admission.STARTED

    def _growing(self) -> list[tuple[int, int]]:
        """The running sequences' tokens, now and in the end."""
        return [(seq.n_tokens, seq.max_cached) for seq in self.running]

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
            _n_pending(other) > 1
            and other.priority <= seq.priority
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

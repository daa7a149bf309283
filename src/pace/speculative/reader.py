"""A draft model beside the target: what it has read of every sequence, in a KV cache of its own.

Nothing of it ever decides an output, so it takes no part in admission: where its blocks run out, or its context ends, the
sequence decodes plainly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pace.engine.runner import TableGatherer
from pace.engine.sampler import NO_BIAS, NO_IDS, History
from pace.engine.sequence import Sequence
from pace.kvcache import KVTables, Reuse
from pace.models.plan import Batch, Executor, F32Array, I32Array, Plan
from pace.speculative.features import SLOT, Features

__all__ = ["DraftReader", "Guess", "Part", "Reading"]

SHARED_TOKENS = 64
"""Tokens in common with a sequence that is being read right now for which another one waits a step, and finds them in the
cache then."""


@dataclass(slots=True, eq=False)
class Reading:
    """How far the draft has read a sequence.

    Attributes:
        seq: whose.
        row: of the draft's tables.
        n_read: tokens of the sequence in the draft's KV cache. What lies behind them, masks and guesses, is overwritten
            before anything sees it.
    """

    seq: Sequence
    row: int
    n_read: int


class Part(NamedTuple):
    """What one pass runs of one sequence.

    Attributes:
        reading: of the sequence.
        first: position of its first row; what lies before is in the draft's cache.
        n_tokens: tokens of the sequence, unread ones.
        extra: ids behind them, which are not of the sequence: masks, guesses.
        n_logits: last rows whose logits are wanted.
    """

    reading: Reading
    first: int
    n_tokens: int
    extra: Seq[int] = ()
    n_logits: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of the pass."""
        return self.n_tokens + len(self.extra)


class Guess(NamedTuple):
    """The best token of each row of logits, and its probability."""

    token_ids: list[int]
    confidences: list[float]


class DraftReader:
    """Runs the draft over parts of many sequences in one pass.

    Args:
        executor: the draft's compiled plan, with the `sample` of `ops.Plan`.
        tables: of its KV cache, a row for each running sequence.
        sample_dtype: `ops.SAMPLE_DTYPE`.
        vocab_size: ids that the draft knows.
        max_tokens, max_seqs: most rows and sequences of one pass.
        max_logit_rows: most rows of logits of one pass.
        max_len: longest sequence that the draft reads, in tokens.
        features: what the draft sees of the target's states; None: nothing.
        ids: i32 [n]: the token of every column of the logits; None: the column.
        never: i32 [m]: tokens that are never guessed: masks, and ids that the target has no token for.
        prefix_caching: look for what was read before.
    """

    def __init__(
        self,
        executor: Any,
        tables: KVTables,
        sample_dtype: npt.DTypeLike,
        *,
        vocab_size: int,
        max_tokens: int,
        max_seqs: int,
        max_logit_rows: int,
        max_len: int,
        features: Features | None = None,
        ids: I32Array | None = None,
        never: I32Array = NO_IDS,
        prefix_caching: bool = True,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_logit_rows = max_logit_rows
        self.max_len = max_len
        self.n_rows = self.n_passes = 0  # run so far
        self.tables = tables
        self.features = features
        self.ir: Plan = executor.ir
        self._feature_rows = None if features is None else executor.slot(SLOT)
        self._executor: Executor = executor
        self._sample = executor.sample
        self._vocab_size = vocab_size
        self._ids = ids
        self._never = never
        self._is_never = np.zeros(vocab_size, np.bool_)
        self._is_never[never] = True
        self._prefix_caching = prefix_caching
        self._readings: dict[Sequence, Reading] = {}
        self._unreadable: set[Sequence] = set()  # they hold a token that the draft does not know
        self._gather = TableGatherer(tables.groups, max_seqs)
        self._params = np.zeros(max_logit_rows, sample_dtype)
        self._params["top_p"] = self._params["repetition_penalty"] = (
            1.0  # greedy, with the token's own probability
        )

    def find(self, seqs: Iterable[Sequence]) -> list[Reading]:
        """Readings of these sequences, begun where they were not; those that can't be read, or not yet, are left out."""
        found = []
        for seq in seqs:
            reading = self._readings.get(seq) or self._open(seq)
            if reading is not None and self._knows(reading):
                found.append(reading)
        return found

    def end(self, seq: Sequence) -> None:
        """Let go of a sequence; its tokens stay in the cache while their blocks are not needed."""
        self._unreadable.discard(seq)
        if self.features is not None:
            self.features.end(seq)
        reading = self._readings.pop(seq, None)
        if reading is not None:
            self.tables.close(reading.row, seq.tokens[: reading.n_read])

    def close(self) -> None:
        """Give back the plan's memory."""
        self._readings.clear()
        self._executor = self._sample = self._feature_rows = None  # type: ignore[assignment]  # closed: nobody calls it

    def room(self, reading: Reading) -> int:
        """Rows that one pass may run of a sequence: its tokens and what is guessed behind them."""
        end = min(self.max_len, self.tables.step_end(reading.n_read))
        return min(self.max_tokens, end - reading.n_read)

    def plan(self, wanted: Mapping[Sequence, int], mask_id: int | None) -> list[Part]:
        """What one pass runs: first those that decode and want guesses, then prompts as far as the target has read them.

        Sequences that decode and want nothing are read when they want something again: no pass is run for them alone.

        Args:
            wanted: as `Drafter.propose` gets it.
            mask_id: n guesses take n - 1 masks, and come of one row each; None: only the first guess is made.

        Returns:
            Parts for which there is room, with logits where all tokens of a sequence are read.
        """
        rows, logit_rows = self.max_tokens, self.max_logit_rows
        parts: list[Part] = []
        waiting: list[Reading] = []
        for reading in self.find(wanted):
            seq, first = reading.seq, reading.n_read
            if not wanted[seq]:
                if seq.n_tokens - seq.n_computed > 1:
                    waiting.append(reading)
                continue
            pending, room = seq.n_tokens - first, min(rows, self.room(reading))
            n = min(wanted[seq] if mask_id is not None else 1, room - pending + 1, logit_rows)
            if n > 0:
                masks = () if mask_id is None else (mask_id,) * (n - 1)
                part = Part(reading, first, pending, masks, n)
            else:
                part = Part(reading, first, min(pending, room))
            if part.n_rows > 0 and self.extend(part):
                parts.append(part)
                rows -= part.n_rows
                logit_rows -= part.n_logits
        for reading in waiting:
            n_tokens = min(reading.seq.n_computed - reading.n_read, rows, self.room(reading))
            part = Part(reading, reading.n_read, n_tokens)
            if n_tokens > 0 and self.extend(part):
                parts.append(part)
                rows -= n_tokens
        return parts

    def run(self, parts: Seq[Part]) -> Guess:
        """One pass; returns the best token of every row of logits, part after part. Parts for which no block is free must
        not be among them: see `extend`.
        """
        tokens, q_start, kv_len = [], [0], []
        logit_rows: list[int] = []
        at = 0
        for reading, first, n_tokens, extra, n_logits in parts:
            if self.features is not None and self._feature_rows is not None:
                rows = self._feature_rows[at : at + n_tokens + len(extra)]
                self.features.fill(rows, reading.seq, first, n_tokens)
            tokens.append(reading.seq.tokens[first : first + n_tokens])
            if extra:
                tokens.append(np.array(extra, np.int32))
            at += n_tokens + len(extra)
            q_start.append(at)
            kv_len.append(first + n_tokens + len(extra))
            logit_rows += range(at - n_logits, at)
        batch = Batch(
            token_ids=np.concatenate(tokens),
            q_start=np.array(q_start, np.int32),
            kv_len=np.array(kv_len, np.int32),
            block_tables=self._gather([part.reading.row for part in parts], kv_len),
            logit_rows=np.array(logit_rows, np.int32),
        )
        logits = self._executor.step(batch)
        self.n_passes += 1
        self.n_rows += at
        for reading, _, n_tokens, _, _ in parts:
            if n_tokens:
                self.advance(reading, n_tokens)
        return self._best(logits)

    def extend(self, part: Part) -> bool:
        """Make room for a part; False where no block is free."""
        return self.tables.extend(part.reading.row, part.first + part.n_rows)

    def _open(self, seq: Sequence) -> Reading | None:
        """Begin to read a sequence, with what of it the cache holds."""
        reuse = self._find(seq)
        n_read = 0 if reuse is None else reuse.n_tokens
        end = n_read + SHARED_TOKENS
        for other in self._readings.values():
            if other.n_read < end <= min(other.seq.n_tokens, seq.n_tokens - 1) and np.array_equal(
                other.seq.tokens[:end], seq.tokens[:end]
            ):
                return None
        row = self.tables.open(0, reuse, seq.cache_salt)
        if row is None:
            return None
        self._readings[seq] = reading = Reading(seq, row, n_read)
        return reading

    def _find(self, seq: Sequence) -> Reuse | None:
        limit = seq.n_tokens - 1
        if not limit:
            return None
        if self._prefix_caching:
            return self.tables.match(seq.tokens[: seq.n_tokens], seq.cache_salt, limit)
        for other in self._readings.values():  # another completion of the same prompt
            if other.seq.request_id == seq.request_id and other.n_read >= seq.n_prompt - 1 > 0:
                return self.tables.fork(other.row, seq.n_prompt - 1)
        return None

    def _knows(self, reading: Reading) -> bool:
        """Whether the draft has every unread token in its vocabulary."""
        seq = reading.seq
        if seq in self._unreadable:
            return False
        unread = seq.tokens[reading.n_read : seq.n_tokens]
        if len(unread) and int(unread.max()) >= self._vocab_size:
            self._unreadable.add(seq)
            return False
        return True

    def advance(self, reading: Reading, n_tokens: int) -> None:
        """The next n_tokens of a sequence are in the cache now."""
        seq, row, n_before = reading.seq, reading.row, reading.n_read
        reading.n_read = n_read = n_before + n_tokens
        self.tables.commit(row, seq.tokens, n_read)
        if n_before < seq.n_prompt <= n_read:
            self.tables.remember_tail(row, seq.tokens, seq.n_prompt)
        if self.tables.has_reach:
            self.tables.release_before(row, n_read)

    def _best(self, logits: F32Array) -> Guess:
        n = len(logits)
        if not n:
            return Guess([], [])
        params, free = self._params[:n], [None] * n
        drawn = self._sample(logits, params, free)
        if self._is_never.take(drawn.tokens, mode="clip").any():
            # Rare after training: to ban them beforehand would copy every row of logits.
            ban = History(NO_IDS, NO_IDS, self._never, NO_IDS, NO_BIAS, NO_IDS)
            drawn = self._sample(logits, params, [ban] * n)
        if drawn.errors.any():
            raise ArithmeticError("its logits hold NaN")
        tokens = drawn.tokens if self._ids is None else self._ids[drawn.tokens]
        return Guess(tokens.tolist(), np.exp(drawn.logprobs).tolist())

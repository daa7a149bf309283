"""From scheduled sequences to a `Batch`, and through the compiled plan to logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from pace.engine.sampler import LogprobsResult
from pace.engine.schedule import Schedule
from pace.engine.sequence import Sequence
from pace.kvcache import GroupTables, blocks_for
from pace.models import plan
from pace.models.plan import Batch, Bf16Array, F32Array, I32Array

__all__ = ["PromptScores", "Runner", "Score", "StepLogits", "TableGatherer"]

NO_TOKENS = np.empty(0, np.int32)

Score: TypeAlias = Callable[[F32Array, I32Array, int], LogprobsResult]
"""score(logits f32 [P, vocab_size], tokens i32 [P], n): what `Sampler.prompt_logprobs` returns."""


class PromptScores(NamedTuple):
    """Log probabilities of prompt tokens, as `LogprobsResult`, and whose they are."""

    seqs: list[tuple[Sequence, int]]
    """Sequences with their number of rows, in order."""
    logprobs: F32Array
    """f32 [P]."""
    ranks: I32Array
    """i32 [P]."""
    top_ids: I32Array
    """i32 [P, K]."""
    top_logprobs: F32Array
    """f32 [P, K]."""
    errors: I32Array
    """i32 [P]."""


@dataclass(slots=True)
class StepLogits:
    """What a step computed; arrays are valid until the next one.

    Attributes:
        logits: f32 [R, vocab_size], a row for each of `sampled` and, behind it, for each of its drafted tokens.
        sampled: sequences of which no pending token is left, so that the next one can be sampled.
        scores: of the prompt tokens whose log probabilities were asked for; None where none were.
        pooled: hidden states, bf16 [n, dim], of the next rows that each of these sequences wants; copies.
    """

    logits: F32Array
    sampled: list[Sequence]
    scores: PromptScores | None = None
    pooled: list[tuple[Sequence, Bf16Array]] = field(default_factory=list)


@dataclass(slots=True)
class _Wanted:
    """For whom the logit rows of a step are.

    Attributes:
        sampled, sampled_rows: who draws from rows, and the numbers of these.
        scored: whose prompt has rows to be scored, and how many; in order they are all the others, but for
        pooled: whose prompt has rows whose hidden states are wanted, and which.
    """

    sampled: list[Sequence]
    sampled_rows: list[int] = field(default_factory=list)
    scored: list[tuple[Sequence, int]] = field(default_factory=list)
    pooled: list[tuple[Sequence, range]] = field(default_factory=list)

    def prompt(self, seq: Sequence, rows: range) -> None:
        """Rows of a prompt."""
        if seq.pool is None:
            self.scored.append((seq, len(rows)))
        else:
            self.pooled.append((seq, rows))


class Runner:
    """Fills preallocated arrays and calls the plan once per step.

    Where prompts are scored, every row of them needs logits, more than fit the plan's array: the LM head then runs on a
    part of the rows at a time.

    Args:
        executor: the compiled plan, or anything else with its `step`.
        groups: tables of each group of layers.
        max_tokens: rows of one step.
        max_seqs: sequences of one step.
        max_logit_rows: rows of logits that the plan keeps, at least max_seqs.
    """

    def __init__(
        self,
        executor: plan.Executor,
        groups: Seq[GroupTables],
        max_tokens: int,
        max_seqs: int,
        max_logit_rows: int,
    ) -> None:
        self.executor = executor
        self.run_s = 0.0  # spent in `executor.step` so far; the rest of a step is Python
        self._token_ids = np.zeros(max_tokens, dtype=np.int32)
        self._counting = np.arange(
            max_seqs + 1, dtype=np.int32
        )  # q_start and logit_rows of one row per sequence
        self._q_start = np.zeros(max_seqs + 1, dtype=np.int32)
        self._kv_len = np.zeros(max_seqs, dtype=np.int32)
        self._gather = TableGatherer(groups, max_seqs)
        self._logit_rows = np.zeros(max_tokens, dtype=np.int32)
        self._max_logit_rows = max_logit_rows

    def run(self, step: Schedule, score: Score) -> StepLogits:
        """Compute one step; the sequences' state is not changed.

        Args:
            score: called with the logits of prompt rows, where log probabilities of a prompt were asked for.
        """
        batch, wanted = self._batch(step)
        start = time.perf_counter()
        logits = self.executor.step(batch)
        self.run_s += time.perf_counter() - start
        if not (wanted.scored or wanted.pooled):
            return StepLogits(logits, wanted.sampled)
        result = self._part_by_part(logits, len(batch.logit_rows), wanted, score)
        if wanted.pooled:
            hidden = self.executor.hidden()
            result.pooled = [(seq, hidden[rows.start : rows.stop].copy()) for seq, rows in wanted.pooled]
        return result

    def _part_by_part(self, logits: F32Array, n_rows: int, wanted: _Wanted, score: Score) -> StepLogits:
        """Score the rows of prompts, a part at a time, and copy those that are sampled, which lie between them.

        Rows whose hidden states are wanted need no logits: parts of nothing else are left out.
        """
        scored = wanted.scored
        is_sampled = np.zeros(n_rows, dtype=bool)
        is_sampled[wanted.sampled_rows] = True
        is_scored = ~is_sampled
        for _, rows in wanted.pooled:
            is_scored[rows.start : rows.stop] = False
        tokens = np.concatenate(
            [NO_TOKENS, *(seq.tokens[seq.n_scored + 1 : seq.n_scored + 1 + n_new] for seq, n_new in scored)]
        )
        n = max((seq.params.prompt_logprobs or 0 for seq, _ in scored), default=0)
        kept, parts = [], []
        at = 0  # of the tokens
        for first in range(0, n_rows, self._max_logit_rows):
            part = slice(first, first + self._max_logit_rows)
            if not (is_sampled[part].any() or is_scored[part].any()):
                continue
            if first:
                start = time.perf_counter()
                logits = self.executor.logits_from(first)
                self.run_s += time.perf_counter() - start
            kept.append(np.compress(is_sampled[part], logits, axis=0))
            prompt_logits = np.compress(is_scored[part], logits, axis=0)
            if len(prompt_logits):
                parts.append(score(prompt_logits, tokens[at : at + len(prompt_logits)], n))
            at += len(prompt_logits)
        scores = None
        if scored:
            scores = PromptScores(
                scored,
                np.concatenate([part.logprobs for part in parts]),
                np.concatenate([part.ranks for part in parts]),
                np.concatenate([part.top_ids for part in parts]),
                np.concatenate([part.top_logprobs for part in parts]),
                np.concatenate([part.errors for part in parts]),
            )
        return StepLogits(np.concatenate(kept) if kept else logits[:0], wanted.sampled, scores)

    def _batch(self, step: Schedule) -> tuple[Batch, _Wanted]:
        if step.n_decode == len(step.seqs) and not step.n_draft:
            return self._decode_batch(step.seqs), _Wanted(step.seqs)
        n_seqs = len(step.seqs)
        token_ids = self._token_ids
        q_start, kv_len, rows = [0], [], []
        logit_rows: list[int] = []
        wanted = _Wanted([])
        at = 0
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            first = seq.n_computed
            end = first + n_new
            if n_new == 1:
                token_ids[at] = seq.tokens[first]
            else:
                token_ids[at : at + n_new] = seq.tokens[first:end]
            if seq.pool is not None or not seq.is_scored:
                # A preempted sequence runs rows again that have given what they had to.
                n_scored = min(end, seq.n_prompt - (seq.pool is None)) - seq.n_scored
                if n_scored > 0:
                    start = at + seq.n_scored - first
                    logit_rows += range(start, start + n_scored)
                    wanted.prompt(seq, range(len(logit_rows) - n_scored, len(logit_rows)))
            at += n_new
            q_start.append(at)
            kv_len.append(end)
            rows.append(seq.row)
            n_rows = 1 + seq.n_draft
            if end == seq.n_tokens + seq.n_draft and seq.pool is None:
                wanted.sampled_rows += range(len(logit_rows), len(logit_rows) + n_rows)
                logit_rows += range(at - n_rows, at)
                wanted.sampled.append(seq)
        # One conversion per array: assigning Python integers to elements one by one costs three times as
        # much.
        self._q_start[: n_seqs + 1] = q_start
        self._kv_len[:n_seqs] = kv_len
        self._logit_rows[: len(logit_rows)] = logit_rows
        batch = Batch(
            token_ids=token_ids[:at],
            q_start=self._q_start[: n_seqs + 1],
            kv_len=self._kv_len[:n_seqs],
            block_tables=self._gather(rows, kv_len),
            logit_rows=self._logit_rows[: len(logit_rows)],
        )
        return batch, wanted

    def _decode_batch(self, seqs: list[Sequence]) -> Batch:
        """One row for each sequence, its last token: most steps, and without the general way's cases."""
        n = len(seqs)
        kv_len = [seq.n_tokens for seq in seqs]
        self._token_ids[:n] = [seq.last_token for seq in seqs]
        self._kv_len[:n] = kv_len
        return Batch(
            token_ids=self._token_ids[:n],
            q_start=self._counting[: n + 1],
            kv_len=self._kv_len[:n],
            block_tables=self._gather([seq.row for seq in seqs], kv_len),
            logit_rows=self._counting[:n],
        )


class TableGatherer:
    """Collects the block tables of a step's sequences in preallocated arrays.

    Args:
        groups: tables of each group of layers.
        max_seqs: sequences of one step.
    """

    def __init__(self, groups: Seq[GroupTables], max_seqs: int) -> None:
        self._tables = [
            (group.array, group.column_tokens, np.zeros(max_seqs * group.array.shape[1], dtype=np.int32))
            for group in groups
        ]

    def __call__(self, rows: list[int], kv_len: list[int]) -> I32Array | tuple[I32Array, ...]:
        """The block tables of a step, i32 [len(rows), columns], one for each group.

        Args:
            rows: of the tables, one for each sequence.
            kv_len: length of each, this step's tokens included.
        """
        longest = max(kv_len)
        gathered = tuple([_gather(*tables, rows, longest) for tables in self._tables])
        return gathered[0] if len(gathered) == 1 else gathered


def _gather(array: I32Array, column_tokens: int, into: I32Array, rows: list[int], longest: int) -> I32Array:
    """The rows of a table, i32 [len(rows), columns]: those in use, as a table of 16-token blocks up to a context of 128k
    would be a megabyte per step."""
    n_columns = blocks_for(longest, column_tokens) if column_tokens else 1
    tables = into[: len(rows) * n_columns].reshape(len(rows), n_columns)
    # mode: the default checks bounds through a temporary copy; the rows are ours.
    array[:, :n_columns].take(rows, 0, tables, "clip")
    return tables

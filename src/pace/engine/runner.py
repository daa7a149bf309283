"""From scheduled sequences to a `Batch`, and through the compiled plan to logits."""

from __future__ import annotations

import time

import numpy as np

from pace.engine.scheduler import Schedule
from pace.engine.sequence import Sequence
from pace.models import plan
from pace.models.plan import Batch, F32Array, I32Array

__all__ = ["Runner"]


class Runner:
    """Fills preallocated arrays and calls the plan once per step.

    Args:
        executor: the compiled plan, or anything else with its `step`.
        block_tables: i32 [rows, max_blocks], owned by `BlockTables`.
        max_tokens: rows of one step.
        max_seqs: sequences of one step.
    """

    def __init__(self, executor: plan.Runner, block_tables: I32Array, max_tokens: int, max_seqs: int) -> None:
        self.executor = executor
        self.run_s = 0.0  # spent in `executor.step` so far; the rest of a step is Python
        self._block_tables = block_tables
        self._token_ids = np.zeros(max_tokens, dtype=np.int32)
        self._q_start = np.zeros(max_seqs + 1, dtype=np.int32)
        self._kv_len = np.zeros(max_seqs, dtype=np.int32)
        self._batch_tables = np.zeros((max_seqs, block_tables.shape[1]), dtype=np.int32)
        self._logit_rows = np.zeros(max_seqs, dtype=np.int32)

    def run(self, step: Schedule) -> tuple[F32Array, list[Sequence]]:
        """Compute one step; the sequences' state is not changed.

        Returns:
            Logits f32 [R, vocab_size], valid until the next call, and the R sequences that they belong to:
            those of which no pending token is left, so that the next one can be sampled.
        """
        batch, sampled = self._batch(step)
        start = time.perf_counter()
        logits = self.executor.step(batch)
        self.run_s += time.perf_counter() - start
        return logits, sampled

    def _batch(self, step: Schedule) -> tuple[Batch, list[Sequence]]:
        n_seqs = len(step.seqs)
        token_ids = self._token_ids
        q_start, kv_len, rows, logit_rows = [0], [], [], []
        sampled = []
        at = 0
        for seq, n_new in zip(step.seqs, step.n_new, strict=True):
            first = seq.n_computed
            end = first + n_new
            if n_new == 1:
                token_ids[at] = seq.tokens[first]
            else:
                token_ids[at : at + n_new] = seq.tokens[first:end]
            at += n_new
            q_start.append(at)
            kv_len.append(end)
            rows.append(seq.row)
            if end == seq.n_tokens:
                logit_rows.append(at - 1)
                sampled.append(seq)
        # One conversion per array: assigning Python integers to elements one by one costs three times as
        # much.
        self._q_start[: n_seqs + 1] = q_start
        self._kv_len[:n_seqs] = kv_len
        self._logit_rows[: len(logit_rows)] = logit_rows
        # mode: the default checks bounds through a temporary copy; the rows are ours.
        np.take(self._block_tables, rows, axis=0, out=self._batch_tables[:n_seqs], mode="clip")
        batch = Batch(
            token_ids=token_ids[:at],
            q_start=self._q_start[: n_seqs + 1],
            kv_len=self._kv_len[:n_seqs],
            block_tables=self._batch_tables[:n_seqs],
            logit_rows=self._logit_rows[: len(logit_rows)],
        )
        return batch, sampled

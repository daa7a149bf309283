"""From logits to tokens: sampling parameters as rows of an array, and one C call for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pace.engine.sequence import Sequence
from pace.models.plan import F32Array, I32Array

__all__ = ["History", "SampleFn", "SampleResult", "Sampler", "derive_seed"]

History = tuple[I32Array, I32Array, I32Array]
"""Prompt ids, output ids, ids that may not be drawn."""

MASK64 = (1 << 64) - 1


class SampleResult(Protocol):
    """One draw for each of R rows; see `ops.sample`."""

    @property
    def tokens(self) -> I32Array:
        """i32 [R]: the drawn tokens."""
        ...

    @property
    def logprobs(self) -> F32Array:
        """f32 [R]: their log probabilities under the unmodified distribution, where asked for."""
        ...

    @property
    def ranks(self) -> I32Array:
        """i32 [R]: their ranks, 1 for the most probable token."""
        ...

    @property
    def top_ids(self) -> I32Array:
        """i32 [R, K]: the most probable tokens; K is the largest number that a row asked for."""
        ...

    @property
    def top_logprobs(self) -> F32Array:
        """f32 [R, K]: their log probabilities, descending."""
        ...

    @property
    def errors(self) -> I32Array:
        """i32 [R]: not 0 where the row can't be sampled, as its logits hold NaN."""
        ...


class SampleFn(Protocol):
    """`ops.sample`, bound to a team."""

    def __call__(
        self, logits: F32Array, params: npt.NDArray[Any], history: Seq[History | None], /
    ) -> SampleResult:
        """Draw one token per row of logits f32 [R, vocab_size]."""
        ...


class Sampler:
    """Keeps the parameters of the running sequences as rows of a structured array.

    A row is written once, at admission; a step gathers rows and adds the positions.

    Args:
        sample: draws the tokens.
        dtype: `ops.SAMPLE_DTYPE`.
        max_seqs: rows.
    """

    def __init__(self, sample: SampleFn, dtype: npt.DTypeLike, max_seqs: int) -> None:
        self.sample_s = 0.0
        self._sample = sample
        self._rows = np.zeros(max_seqs, dtype=dtype)

    def open(self, seq: Sequence) -> None:
        """Write the parameters of a sequence that was just admitted."""
        params = seq.params
        row = self._rows[seq.row]
        row["temperature"] = 0.0 if params.greedy else params.temperature
        row["top_k"] = params.top_k
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        row["repetition_penalty"] = params.repetition_penalty
        row["presence_penalty"] = params.presence_penalty
        row["frequency_penalty"] = params.frequency_penalty
        # -1: not even the drawn token's log probability, which costs a pass over the vocabulary.
        row["n_logprobs"] = -1 if params.logprobs is None else params.logprobs
        row["seed"] = seq.seed

    def sample(self, logits: F32Array, seqs: list[Sequence]) -> SampleResult:
        """Draw the next token of every sequence.

        A draw depends on the request's seed and the token's position only, so that it does not matter in
        which step or beside whom it happens.

        Args:
            logits: f32 [R, vocab_size].
            seqs: the R sequences.
        """
        params = self._rows[[seq.row for seq in seqs]]
        params["position"] = [seq.n_tokens for seq in seqs]
        return self._sample(logits, params, [seq.history() for seq in seqs])


def derive_seed(engine_seed: int, n_requests: int) -> int:
    """The seed of a request that gives none: splitmix64 of the engine's seed and the request's number.

    A plain sum would give request 1 of seed 0 the numbers of request 0 of seed 1.
    """
    z = engine_seed & MASK64
    for word in (0, n_requests):
        z = (z + 0x9E3779B97F4A7C15 + word) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        z ^= z >> 31
    return z

"""Draws and log probabilities of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pace._ext import _kernels
from pace.models.plan import F32Array as F32
from pace.models.plan import I32Array as I32
from pace.ops.team import Team

SAMPLE_DTYPE = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("repetition_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("top_k", "i4"),
        ("n_logprobs", "i4"),
        ("seed", "u8"),
        ("position", "u8"),
        ("sample_index", "u4"),
    ]
)
"""One row's sampling parameters. top_k <= 0, top_p >= 1 and min_p <= 0 are off; temperature 0 is greedy, others are
at least 1e-5. n_logprobs: -1 none, 0 the drawn token's, n also the n best. seed, position and sample_index choose the
random number."""


class SampleResult(NamedTuple):
    """What `sample` drew, one entry per row; K is the largest n_logprobs of the batch."""

    tokens: I32  # [R]
    logprobs: F32  # [R] log-softmax of the raw logits at the token; 0 where n_logprobs < 0
    ranks: I32  # [R] tokens whose logit is at least the token's: 1 for the best
    top_ids: I32  # [R, K] most likely tokens, -1 where fewer were asked for
    top_logprobs: F32  # [R, K]
    errors: I32  # [R] not 0: nothing was drawn; -1: the row holds a NaN or +inf, -2: no token is left


def sample(
    team: Team,
    logits: F32,
    params: npt.NDArray[Any],
    history: Sequence[tuple[Any, ...] | None],
    maxima: F32 | None = None,
    out: SampleResult | None = None,
) -> SampleResult:
    """Draw one token per row; rows are independent of each other and of how many there are.

    Args:
        logits: f32 [R, V]; each row contiguous.
        params: [R] of SAMPLE_DTYPE.
        history: per row None, or (prompt ids, output ids, banned ids, bias ids, biases, allowed ids, mask): the
            first two for penalties; biases are added to the logits of distinct bias ids; no allowed ids: all are; mask u32
            [ceil(V / 32)]: bit i % 32 of word i // 32 allows token i; None or left out: all are.
            Ids outside the vocabulary are ignored.
        maxima: f32 [R, blocks of 128 columns]: the largest logit of each block, NaN where it holds one; None: they
            are computed.
        out: an earlier result to write over, where it has the right shape: a step leaves nothing of the interpreter
            in the caches, and six new arrays cost 30 us then.
    """
    n = len(logits)
    k = _kernels.most_logprobs(params)
    if out is None or out.top_ids.shape != (n, k):
        out = SampleResult(
            np.empty(n, np.int32),
            np.empty(n, np.float32),
            np.empty(n, np.int32),
            np.full((n, k), -1, np.int32),
            np.zeros((n, k), np.float32),
            np.zeros(n, np.int32),
        )
    _kernels.sample(team._team, logits, maxima, params, history, *out)
    return out


class LogprobsResult(NamedTuple):
    """What `logprobs` found, one entry per row; K is max(1, n)."""

    logprobs: F32  # [R] log-softmax of the logits at the token
    ranks: I32  # [R] tokens whose logit is at least the token's: 1 for the best
    top_ids: I32  # [R, K] most likely tokens, -1 where n is 0
    top_logprobs: F32  # [R, K]
    errors: I32  # [R] not 0: the row has no distribution, as for `sample`; its entries hold nothing


def logprobs(team: Team, logits: F32, tokens: I32, n: int) -> LogprobsResult:
    """Log probabilities of given tokens, and of the n most likely ones of their rows.

    Args:
        logits: f32 [R, V].
        tokens: i32 [R], 0 <= token < V.
        n: how many most likely tokens, 0 <= n <= V.

    Raises:
        ValueError: lengths differ, or a token or n is out of range.
    """
    rows, k = len(logits), max(1, n)
    out = LogprobsResult(
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int32),
        np.full((rows, k), -1, np.int32),
        np.zeros((rows, k), np.float32),
        np.zeros(rows, np.int32),
    )
    _kernels.logprobs(team._team, logits, tokens, n, *out)
    return out


def softmax(x: F32) -> None:
    """Softmax of one f32 row, in place."""
    _kernels.softmax(x)


def argmax(x: F32) -> int:
    """Index of the largest element (the lowest among equals), -1 if there is a NaN."""
    return _kernels.argmax(x)

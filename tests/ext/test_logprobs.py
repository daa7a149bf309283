"""Log probabilities against numpy, of tokens that are drawn and of given ones, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from ext.kit import constraints, rng, sample_params

from pace import ops


def test_logprobs(team: ops.Team) -> None:
    """Of the raw logits, whatever the temperature and penalties; ranks and the n best."""
    vocab, n = 307, 12
    r = rng("logprobs")
    logits = (4 * r.standard_normal((n, vocab))).astype(np.float32)
    wanted = [-1, 0, 1, 5, 20, 307, 3, 0, -1, 2, 7, 1]
    params = sample_params(n, temperature=1.3, frequency_penalty=1.0, n_logprobs=np.array(wanted), seed=5)
    history = [constraints(np.arange(9), np.arange(30))] * n
    got = ops.sample(team, logits, params, history)
    x = logits.astype(np.float64)
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    assert got.top_ids.shape == got.top_logprobs.shape == (n, vocab)
    for i, k in enumerate(wanted):
        token = got.tokens[i]
        if k < 0:
            assert got.logprobs[i] == 0 and (got.top_ids[i] == -1).all()
            continue
        assert abs(got.logprobs[i] - logp[i, token]) < 1e-5
        assert got.ranks[i] == (logits[i] >= logits[i, token]).sum()
        best = np.lexsort((np.arange(vocab), -logits[i]))[:k]
        assert got.top_ids[i, :k].tolist() == best.tolist()
        assert np.abs(got.top_logprobs[i, :k] - logp[i, best]).max(initial=0) < 1e-5
        assert (got.top_ids[i, k:] == -1).all()


@pytest.mark.parametrize(("vocab", "n"), [(1, 1), (50, 0), (307, 20), (20_000, 5)])
def test_logprobs_of_given_tokens(team: ops.Team, vocab: int, n: int) -> None:
    """log_softmax, ranks and the n best, on any number of threads; bad rows are reported one by one."""
    r = rng("given", vocab)
    logits = (4 * r.standard_normal((9, vocab))).astype(np.float32)
    tokens = r.integers(0, vocab, 9).astype(np.int32)
    got = ops.logprobs(team, logits, tokens, n)
    single = ops.Team(1)
    for a, b in zip(got, ops.logprobs(single, logits, tokens, n), strict=True):
        assert a.tobytes() == b.tobytes()
    single.close()
    x = logits.astype(np.float64)
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    assert got.top_ids.shape == got.top_logprobs.shape == (9, max(1, n)) and not got.errors.any()
    for i, token in enumerate(tokens):
        assert abs(got.logprobs[i] - logp[i, token]) < 1e-5
        assert got.ranks[i] == (logits[i] >= logits[i, token]).sum()
        best = np.lexsort((np.arange(vocab), -logits[i]))[:n]
        assert got.top_ids[i, :n].tolist() == best.tolist()
        assert np.abs(got.top_logprobs[i, :n] - logp[i, best]).max(initial=0) < 1e-5
        same = got.top_logprobs[i, :n][got.top_ids[i, :n] == token]
        assert (same == got.logprobs[i]).all(), "a client may compare the two floats"
    logits[3, vocab - 1], logits[5] = np.nan, -np.inf
    bad = ops.logprobs(team, logits, tokens, n)
    assert bad.errors.tolist() == [0, 0, 0, -1, 0, -2, 0, 0, 0]
    good = bad.errors == 0
    assert all(a[good].tobytes() == b[good].tobytes() for a, b in zip(got, bad, strict=True))


def test_logprobs_refuses(team: ops.Team) -> None:
    logits, tokens = np.zeros((2, 8), np.float32), np.zeros(2, np.int32)
    assert len(ops.logprobs(team, logits[:0], tokens[:0], 3).ranks) == 0
    for wrong, n in (
        (tokens[:1], 0),
        (np.array([0, 8], np.int32), 0),
        (np.array([-1, 0], np.int32), 0),
        (tokens, 9),
    ):
        with pytest.raises(ValueError):
            ops.logprobs(team, logits, wrong, n)
    with pytest.raises(ValueError):
        ops.logprobs(team, logits, tokens, -1)


def test_too_many_logprobs(team: ops.Team) -> None:
    with pytest.raises(ValueError, match="9 logprobs"):
        ops.sample(team, np.zeros((1, 8), np.float32), sample_params(1, n_logprobs=9), [None])

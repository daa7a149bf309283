"""The sampler against numpy: draws, filters, constraints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import NO_IDS, constraints, rng, sample_params

from pace import ops
from pace.params import SamplingParams


def philox(seed: int, position: int, index: int = 0) -> float:
    """Philox4x32-10 (Salmon et al., SC 2011), as sampler.h specifies it: a double in [0, 1)."""
    mask = 0xFFFFFFFF
    c = [position & mask, position >> 32, index, 0]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & mask, (p0 >> 32) ^ c[3] ^ key[1], p0 & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return ((c[0] >> 5) * 67108864 + (c[1] >> 6)) / 9007199254740992


Row = tuple[np.ndarray, ...]


def edited(x: np.ndarray, row: np.void, history: Row | None) -> np.ndarray:
    """Logits after masks, bias and penalties, in float64."""
    x = x.astype(np.float64)
    if history is None:
        return x
    prompt, output, banned, bias_ids, bias, allowed = history
    n = len(x)
    if len(allowed):
        masked = np.ones(n, bool)
        masked[allowed[allowed < n]] = False
        x[masked] = -np.inf
    x[banned[banned < n]] = -np.inf
    x[bias_ids[bias_ids < n]] += bias[bias_ids < n]
    seen = np.union1d(prompt, output).astype(int)
    r = float(row["repetition_penalty"])
    x[seen] = np.where(x[seen] > 0, x[seen] / r, x[seen] * r)
    ids, counts = np.unique(output, return_counts=True)
    x[ids] -= float(row["frequency_penalty"]) * counts + float(row["presence_penalty"])
    return x


def candidates(x: np.ndarray, row: np.void) -> tuple[np.ndarray, np.ndarray]:
    """Token ids in the order in which the draw walks them, and their weights, after all filters."""
    w = np.exp((x - x.max()) / float(row["temperature"]))
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[w[order] >= float(row["min_p"])]
    if 0 < row["top_k"] < len(x):
        order = order[: row["top_k"]]
    if row["top_p"] < 1:
        before = np.cumsum(w[order]) - w[order]
        order = order[before < float(row["top_p"]) * w[order].sum()]
    if not 0 < row["top_k"] < len(x) and row["top_p"] >= 1:
        order = np.sort(order)
    return order, w[order]


def assert_drawn(token: int, x: np.ndarray, row: np.void) -> None:
    """The token whose share of the cumulated weight holds u; f32 weights may move an edge by 1e-5."""
    order, w = candidates(x, row)
    at = np.nonzero(order == token)[0]
    assert len(at), f"token {token} was filtered out"
    ends = np.cumsum(w) / w.sum()
    u = philox(int(row["seed"]), int(row["position"]), int(row["sample_index"]))
    assert ends[at[0]] - w[at[0]] / w.sum() - 1e-5 <= u <= ends[at[0]] + 1e-5


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 300, "temperature": 1.7},
    {"top_p": 0.1},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"min_p": 1e-4, "temperature": 1.5},
    {"min_p": 0.05, "top_p": 0.7, "temperature": 2.0},
    {"top_p": 0.99999994},
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 50.0, "top_p": 0.5},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 307, 1000, 20_001])
def test_draws_match_numpy(team: ops.Team, vocab: int, filters: dict[str, Any]) -> None:
    """64 seeded draws from one row: each is the token that numpy finds, from the same generator."""
    logits = np.repeat((3 * rng("draw", vocab).standard_normal((1, vocab))).astype(np.float32), 64, axis=0)
    params = sample_params(64, **filters)
    params["seed"] = np.arange(64, dtype=np.uint64) * np.uint64(0x123456789ABCDEF)
    params["position"] = np.arange(64) // 3
    params["sample_index"] = np.arange(64) % 3
    got = ops.sample(team, logits, params, [None] * 64)
    assert not got.errors.any()
    for token, row in zip(got.tokens, params, strict=True):
        assert_drawn(int(token), logits[0].astype(np.float64), row)


def test_draws_have_the_right_frequencies(team: ops.Team) -> None:
    """20,000 draws: each token within 5 standard deviations of its probability."""
    n = 20_000
    x = np.array([2.0, 1.0, 0.0, -1.0, -1.0, 0.5], np.float32)
    params = sample_params(n, seed=7)
    params["position"] = np.arange(n)
    counts = np.bincount(
        ops.sample(team, np.repeat(x[None], n, axis=0), params, [None] * n).tokens, minlength=6
    )
    p = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum()
    assert (np.abs(counts / n - p) < 5 * np.sqrt(p * (1 - p) / n)).all()


def test_filters_keep_exactly_their_support(team: ops.Team) -> None:
    """Flat-ish logits and many draws: every kept token appears, no other does."""
    x = np.log(np.array([0.02, 0.3, 0.08, 0.25, 0.05, 0.2, 0.1], np.float32))
    want = {
        ("top_k", 3): {1, 3, 5},
        ("top_p", 0.5): {1, 3},
        ("top_p", 0.56): {1, 3, 5},
        ("min_p", 0.3): {1, 3, 5, 6},
        ("top_k", 7): set(range(7)),
        ("top_k", 0): set(range(7)),
        ("top_k", -1): set(range(7)),
    }
    for (name, value), support in want.items():
        params = sample_params(2000, seed=3, **{name: value})
        params["position"] = np.arange(2000)
        got = ops.sample(team, np.repeat(x[None], 2000, axis=0), params, [None] * 2000)
        assert set(got.tokens.tolist()) == support, (name, value)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -0.5, "presence_penalty": -1.0, "repetition_penalty": 1.2},
        {},
    ],
    ids=str,
)
def test_penalties(team: ops.Team, temperature: float, penalties: dict[str, float]) -> None:
    vocab, n = 60, 40
    r = rng("penalties")
    logits = (2 * r.standard_normal((n, vocab))).astype(np.float32)
    params = sample_params(n, temperature=temperature, **penalties)
    params["seed"] = np.arange(n)
    history = [
        constraints(
            r.integers(0, vocab, 12),
            r.integers(0, vocab // 2, r.integers(0, 30)),
            r.choice(vocab, 5, replace=False),
        )
        for _ in range(n)
    ]
    kept = logits.copy()
    got = ops.sample(team, logits, params, history)
    assert np.array_equal(kept, logits), "the logits are the plan's memory"
    for i, token in enumerate(got.tokens):
        x = edited(logits[i], params[i], history[i])
        if temperature == 0:
            assert x[token] >= x.max() - 1e-5
        else:
            assert_drawn(int(token), x, params[i])
        assert token not in history[i][2]


@pytest.mark.parametrize("vocab", [7, 300, 3001])
@pytest.mark.parametrize(
    "filters", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str
)
def test_mixed_constraints_match_numpy(team: ops.Team, vocab: int, filters: dict[str, float]) -> None:
    """Allowed tokens, bans, bias and penalties in every mixture, ids outside the vocabulary among them."""
    n = 64
    r = rng("mixed", vocab)
    logits = (3 * r.standard_normal((n, vocab))).astype(np.float32)
    params = sample_params(n, **filters, seed=11, n_logprobs=2)
    params["position"] = np.arange(n)
    params["repetition_penalty"] = r.choice([1.0, 1.3], n)
    params["frequency_penalty"] = r.choice([0.0, 0.7], n)
    history: list[Any] = []
    for i in range(n):
        allowed = r.choice(vocab + 5, vocab // 2 + 1, replace=False) if i & 1 else NO_IDS
        banned = r.choice(vocab + 5, vocab // 4, replace=False) if i & 2 else NO_IDS
        bias_ids = r.choice(vocab + 5, vocab // 3, replace=False) if i & 4 else NO_IDS
        bias = r.uniform(-8, 8, len(bias_ids))
        output = r.integers(0, vocab, 20) if i & 8 else NO_IDS
        history.append(constraints(output[:5], output, banned, bias_ids, bias, allowed))
    got = ops.sample(team, logits, params, history)
    for i, token in enumerate(got.tokens):
        x = edited(logits[i], params[i], history[i])
        if x.max() == -np.inf:
            assert (token, got.errors[i]) == (-1, -2)
            continue
        assert got.errors[i] == 0 and x[token] > -np.inf
        best = np.sort(x)[-2:]
        if filters.get("temperature") != 0.0:
            assert_drawn(int(token), x, params[i])
        elif len(best) < 2 or best[1] - best[0] > 1e-4:
            assert token == x.argmax()
        raw = logits[i].astype(np.float64)
        raw -= raw.max()
        assert abs(got.logprobs[i] - (raw[token] - np.log(np.exp(raw).sum()))) < 1e-5, "of the raw logits"
        assert got.top_ids[i].tolist() == np.lexsort((np.arange(vocab), -raw))[:2].tolist()


def test_a_bias_forces_and_forbids(team: ops.Team) -> None:
    x = rng("bias").standard_normal((4, 500)).astype(np.float32)
    x[2, 7] = -9.0
    history = [
        constraints(bias_ids=[123], bias=[100.0]),
        constraints(bias_ids=[int(x[1].argmax())], bias=[-100.0]),
        constraints(bias_ids=[7], bias=[100.0], banned=[7]),
        constraints(bias_ids=[7, 9], bias=[100.0, 1.0], allowed=[9, 10]),
    ]
    got = ops.sample(team, x, sample_params(4, temperature=0.0), history).tokens
    assert got[0] == 123 and got[1] == np.argsort(x[1])[-2] and got[2] == x[2].argmax()
    assert got[3] == (9 if x[3, 9] + 1 >= x[3, 10] else 10)


def test_samples_of_one_prompt_are_independent(team: ops.Team) -> None:
    """sample_index: the same frequencies, other numbers, and each repeats itself."""
    n, vocab = 4000, 8
    x = np.repeat(rng("n").standard_normal((1, vocab)).astype(np.float32), n, axis=0)
    params = sample_params(n, seed=5)
    params["position"] = np.arange(n)
    drawn = []
    for index in range(3):
        params["sample_index"] = index
        drawn.append(ops.sample(team, x, params, [None] * n).tokens)
        assert drawn[-1].tobytes() == ops.sample(team, x, params, [None] * n).tokens.tobytes()
    p = np.exp(x[0].astype(np.float64))
    p /= p.sum()
    agree = (p**2).sum()
    for i in range(3):
        counts = np.bincount(drawn[i], minlength=vocab) / n
        assert (np.abs(counts - p) < 5 * np.sqrt(p * (1 - p) / n)).all()
        same = (drawn[i] == drawn[i - 1]).mean()
        assert abs(same - agree) < 5 * np.sqrt(agree * (1 - agree) / n), "as two independent draws agree"


def test_greedy_is_decided_by_who_makes_the_parameters(team: ops.Team) -> None:
    """9.9999999e-6 is below 1e-5 as a double and equal to it as a float: nobody decides it a second time."""
    x = np.zeros((1, 300), np.float32)
    x[0, 7] = 1e-7
    history: list[Any] = [None]
    assert SamplingParams(temperature=9.9999999e-6).greedy
    least = np.float32(9.9999999e-6)
    drawn = {
        int(ops.sample(team, x, sample_params(1, temperature=least, seed=seed), history).tokens[0])
        for seed in range(64)
    }
    assert len(drawn) > 10, "it is a temperature like others"
    for wrong in (1e-6, 1e-40, -1.0, np.nan):
        with pytest.raises(ValueError, match="row 0 has temperature"):
            ops.sample(team, x, sample_params(1, temperature=wrong), history)


def test_greedy_takes_the_lowest_of_equals(team: ops.Team) -> None:
    x = np.zeros((3, 300), np.float32)
    x[0, [250, 17, 140]] = 2.0
    x[1, 299] = 1e-30
    got = ops.sample(team, x, sample_params(3, temperature=0.0, top_k=5, top_p=0.1), [None] * 3)
    assert got.tokens.tolist() == [17, 299, 0]


def test_masked_logits_are_never_drawn(team: ops.Team) -> None:
    x = np.full((200, 50), -np.inf, np.float32)
    x[:, [3, 40]] = [0.0, 1.0]
    params = sample_params(200, seed=9, temperature=5.0)
    params["position"] = np.arange(200)
    for filters in ({}, {"top_k": 10}, {"top_p": 0.999}):
        for name, value in filters.items():
            params[name] = value
        got = ops.sample(team, x, params, [None] * 200)
        assert set(got.tokens.tolist()) == {3, 40}, filters


@pytest.mark.parametrize("vocab", [7, 32, 300])
@pytest.mark.parametrize(
    "filters", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str
)
def test_a_mask_comes_before_everything_else(team: ops.Team, vocab: int, filters: dict[str, float]) -> None:
    """A bitset allows what `allowed` with the same ids does, whatever else there is; bits beyond mean nothing."""
    r = rng()
    n = 12
    logits = r.normal(size=(n, vocab)).astype(np.float32) * 3
    params = sample_params(n, seed=np.arange(n), repetition_penalty=1.3, n_logprobs=0, **filters)
    masked, listed = [], []
    none = np.empty(0, np.int32)
    for _ in range(n):
        allowed = np.sort(r.choice(vocab, r.integers(1, min(vocab, 5)), replace=False)).astype(np.int32)
        banned = np.setdiff1d(r.integers(0, vocab, 3), allowed[:1]).astype(np.int32)
        words = np.zeros((vocab + 31) // 32, np.uint32)
        for token in allowed:
            words[token // 32] |= np.uint32(1 << (token % 32))
        if vocab % 32:
            words[-1] |= np.uint32((0xFFFFFFFF << (vocab % 32)) & 0xFFFFFFFF)
        history = (allowed, allowed, banned, none, np.empty(0, np.float32))
        masked.append((*history, none, words))
        listed.append((*history, allowed))
    got, want = ops.sample(team, logits, params, masked), ops.sample(team, logits, params, listed)
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == b.tobytes()

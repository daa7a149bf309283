"""The sampler's rows: alone as in any company, on every tier, with gaps between them; bad ones, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ext.kit import NO_IDS, build, chosen, constraints, packed, put, rng, rows_batch, sample_params

from pace import ops
from pace._ext import _kernels
from pace.models import plan as ir


def test_sampling_reads_rows_with_gaps(team: ops.Team) -> None:
    """As the plan's logits have where no vector divides the vocabulary."""
    wide = np.random.default_rng(3).standard_normal((5, 320)).astype(np.float32)
    logits = wide[:, :307]
    wide[:, 307:] = np.inf
    got = ops.sample(team, logits, sample_params(5, temperature=0.0, n_logprobs=0), [None] * 5)
    assert got.tokens.tolist() == logits.argmax(axis=1).tolist() and not got.errors.any()
    again = ops.logprobs(team, logits, got.tokens, 0)
    assert again.logprobs.tobytes() == got.logprobs.tobytes()
    with pytest.raises(ValueError, match="side by side"):
        ops.sample(team, wide.T[:5], sample_params(5), [None] * 5)


def test_a_result_that_is_used_again_keeps_nothing(team: ops.Team) -> None:
    """Of a step in which a row wanted more, or got any: top_ids behind a row's own are -1, and an error's all."""
    x = rng("again").standard_normal((4, 200)).astype(np.float32)
    first = ops.sample(team, x, sample_params(4, n_logprobs=5), [None] * 4)
    x[3, 0] = np.nan
    wanted = np.array([5, 2, -1, 5])
    params = sample_params(4, n_logprobs=wanted)
    fresh = ops.sample(team, x, params, [None] * 4)
    again = ops.sample(team, x, params, [None] * 4, None, first)
    assert again.top_ids is first.top_ids and again.errors.tolist() == [0, 0, 0, -1]
    assert [a.tobytes() for a in again] == [a.tobytes() for a in fresh]
    assert (again.top_ids >= 0).sum(axis=1).tolist() == [5, 2, 0, 0]
    assert again.logprobs[2:].tolist() == again.ranks[2:].tolist() == [0, 0]


def test_a_draw_depends_on_its_row_only(team: ops.Team) -> None:
    """Seed, position and index decide: alone, in any company, in any order, on any number of threads."""
    n, vocab = 33, 500
    r = rng("rows")
    logits = (2 * r.standard_normal((n, vocab))).astype(np.float32)
    params = sample_params(n, temperature=0.9, top_p=0.95, n_logprobs=3)
    params["seed"], params["position"] = r.integers(0, 2**63, n), r.integers(0, 5000, n)
    params["top_k"], params["sample_index"] = r.choice([0, 1, 20, 100], n), r.integers(0, 128, n)
    history: list[Any] = [
        None
        if i % 3 == 0
        else constraints(
            r.integers(0, vocab, 9),
            r.integers(0, vocab, 9),
            r.integers(0, vocab, 9),
            np.arange(i),
            r.uniform(-2, 2, i),
            np.arange(i, vocab),
        )
        for i in range(n)
    ]
    whole = ops.sample(team, logits, params, history)
    order = r.permutation(n)
    shuffled = ops.sample(team, logits[order], params[order], [history[i] for i in order])
    for a, b in zip(whole, shuffled, strict=True):
        assert a[order].tobytes() == b.tobytes()
    single = ops.Team(1)
    for i in range(n):
        alone = ops.sample(single, logits[i : i + 1], params[i : i + 1], [history[i]])
        assert [a.tobytes() for a in alone] == [a[i : i + 1].tobytes() for a in whole]
    single.close()


def test_bad_rows_are_reported_one_by_one(team: ops.Team) -> None:
    """NaN, +inf, nothing left: an error for the row, and the others are drawn as ever."""
    x = rng("bad").standard_normal((6, 200)).astype(np.float32)
    clean = ops.sample(team, x, sample_params(6, seed=1), [None] * 6)
    x[1, 199] = np.nan
    x[2, 3] = np.inf
    x[3] = -np.inf
    history: list[Any] = [None] * 6
    history[4] = constraints(banned=np.arange(200))
    got = ops.sample(team, x, sample_params(6, seed=1), history)
    assert got.errors.tolist() == [0, -1, -1, -2, -2, 0]
    assert got.tokens[1:5].tolist() == [-1] * 4
    history[4] = constraints(allowed=[200, 5000, -1])
    assert ops.sample(team, x, sample_params(6, seed=1), history).errors[4] == -2, (
        "no allowed id is in the vocabulary"
    )
    assert got.tokens[[0, 5]].tolist() == clean.tokens[[0, 5]].tolist()


@pytest.mark.parametrize("isa", ops.isas())
def test_every_tier_draws_alike(team: ops.Team, isa: str) -> None:
    """The one pass that tiers differ in has the same lanes everywhere: bytes equal those of the best tier."""
    x = (3 * rng("tiers").standard_normal((64, 5003))).astype(np.float32)
    params = sample_params(64, temperature=1.2, n_logprobs=4, seed=np.arange(64))
    params["top_p"][::2] = 0.9
    best = ops.sample(team, x, params, [None] * 64)
    with ops.using_isa(isa):
        for a, b in zip(best, ops.sample(team, x, params, [None] * 64), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("isa", [*ops.isas(), "reference"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_lm_head_notes_maxima(isa: str, n_threads: int) -> None:
    """`Plan.sample` draws the same as `sample`, from the logits and any slice of them, NaN rows and odd widths included;
    that it doesn't read the rows for it shows where the noted maxima are changed."""
    own = ops.Team(n_threads)
    tier = ops.isas()[0] if isa == "reference" else isa
    with ops.using_isa(tier):
        for vocab, rows in ((1, 3), (127, 5), (128, 2), (307, 70), (1600, 33), (5003, 300)):
            r = rng("maxima", vocab)
            slots = [ir.Slot("a", 32, "bf16", "tokens"), ir.Slot("c", vocab, "f32", "tokens")]
            weights = {"w": packed(own, r.standard_normal((vocab, 32)))}
            plan = build(own, [ir.Gemm("g", "a", "c", "w")], slots, weights, kernels=chosen(isa))
            x = r.standard_normal((rows, 32))
            x[1] = np.nan
            put(plan, "a", x)
            logits = plan.step(rows_batch(rows))
            params = sample_params(rows, n_logprobs=1, temperature=np.arange(rows) % 3)
            history: list[Any] = [None if i % 2 else constraints(banned=[i % vocab]) for i in range(rows)]
            if vocab == 1:
                history = [None] * rows
            for part in (slice(rows), slice(1, rows), slice(1, 2), slice(rows, rows)):
                want = ops.sample(own, logits[part].copy(), params[part], history[part])
                got = plan.sample(logits[part], params[part], history[part])
                assert [a.tobytes() for a in got] == [a.tobytes() for a in want], (vocab, part)
                elsewhere = plan.sample(logits[part].copy(), params[part], history[part])
                assert [a.tobytes() for a in elsewhere] == [a.tobytes() for a in want]
            assert got.errors.tolist() == [] and plan.sample(logits, params, history).errors[1] == -1
            assert (plan._maxima is None) == (isa == "reference")
            if plan._maxima is not None:
                plan._maxima[0] = np.nan
                assert plan.sample(logits, params, history).errors[0] == -1
    own.close()


def test_rows_may_have_padding_between_them(team: ops.Team) -> None:
    """As a plan's have, where the vocabulary is no multiple of 16."""
    wide = rng("padding").standard_normal((5, 320)).astype(np.float32)
    wide[:, 307:] = 99.0
    x, params = wide[:, :307], sample_params(5, n_logprobs=2)
    want = ops.sample(team, x.copy(), params, [None] * 5)
    assert [a.tobytes() for a in ops.sample(team, x, params, [None] * 5)] == [a.tobytes() for a in want]
    scores = ops.logprobs(team, x, want.tokens, 2)
    assert scores.logprobs.tobytes() == want.logprobs.tobytes()


def test_sample_of_no_rows(team: ops.Team) -> None:
    got = ops.sample(team, np.empty((0, 10), np.float32), sample_params(0), [])
    assert len(got.tokens) == 0


@pytest.mark.parametrize(
    ("logits", "n_params", "history"),
    [
        (np.zeros((2, 8), np.float32), 1, [None, None]),
        (np.zeros((2, 8), np.float32), 2, [None]),
        (np.zeros((2, 8), np.float64), 2, [None, None]),
        (np.zeros((2, 16), np.float32)[:, ::2], 2, [None, None]),
    ],
)
def test_sample_refuses(team: ops.Team, logits: np.ndarray, n_params: int, history: list[None]) -> None:
    with pytest.raises(ValueError):
        ops.sample(team, logits, sample_params(n_params), history)


@pytest.mark.parametrize(
    "row",
    [
        (NO_IDS, NO_IDS, NO_IDS),
        constraints(bias_ids=[1, 2], bias=[1.0]),
        (*constraints()[:5], NO_IDS.astype(np.int64)),
        (*constraints()[:4], NO_IDS, NO_IDS),
    ],
)
def test_sample_refuses_a_malformed_history(team: ops.Team, row: Any) -> None:
    with pytest.raises(ValueError):
        ops.sample(team, np.zeros((1, 8), np.float32), sample_params(1), [row])


@pytest.mark.parametrize("short", range(6))
def test_results_of_the_wrong_size(team: ops.Team, short: int) -> None:
    """The extension writes a row's results by its number: arrays for fewer rows are refused, for draws and scores."""
    x = np.zeros((3, 8), np.float32)
    drawn: list[Any] = list(ops.sample(team, x, sample_params(3), [None] * 3))
    scored: list[Any] = list(ops.logprobs(team, x, np.zeros(3, np.int32), 2))
    drawn[short] = drawn[short][:2]
    with pytest.raises(ValueError, match="3 rows"):
        _kernels.sample(team._team, x, None, sample_params(3), [None] * 3, *drawn)
    if short < 5:
        scored[short] = scored[short][:2]
        with pytest.raises(ValueError, match="3 rows"):
            _kernels.logprobs(team._team, x, np.zeros(3, np.int32), 2, *scored)


def test_a_mask_of_another_vocabulary_and_an_empty_one_are_refused(team: ops.Team) -> None:
    none, x = np.empty(0, np.int32), np.zeros((1, 40), np.float32)
    free = (none, none, none, none, np.empty(0, np.float32), none)
    with pytest.raises(ValueError, match="a mask of 1 words for 40 columns"):
        ops.sample(team, x, sample_params(1), [(*free, np.ones(1, np.uint32))])
    assert ops.sample(team, x, sample_params(1), [(*free, np.zeros(2, np.uint32))]).errors.tolist() == [-2]
    assert ops.sample(team, x, sample_params(1), [(*free, None)]).errors.tolist() == [0]

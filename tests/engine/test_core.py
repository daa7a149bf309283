"""The engine over a fake model whose logits reveal every slip of batching, chunking and block tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from engine.fakes import VOCAB, greedy, make_engine, params, run
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.engine.core import Engine
from pace.errors import CapacityError, QueueFullError, RequestError
from pace.outputs import RequestOutput


def test_one_request_is_what_the_model_says() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [3, 1, 4], params(max_tokens=10), prompt="text")
    (output,) = run(engine).values()
    completion = output.outputs[0]
    assert completion.token_ids == greedy([3, 1, 4], 10)
    assert (completion.finish_reason, completion.stop_reason, completion.index) == ("length", None, 0)
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("text", [3, 1, 4], True)
    assert completion.logprobs is None and completion.cumulative_logprob is None
    assert output.metrics.n_output_tokens == 10 and output.metrics.n_prompt_tokens == 3
    assert output.metrics.decode_tokens_per_s is not None


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 20), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    max_tokens=st.integers(4, 40),
    n_blocks=st.integers(4, 12),
    n_seqs=st.integers(1, 4),
)
def test_numbers_do_not_depend_on_the_company(
    requests: list[tuple[int, int, int, bool]], max_tokens: int, n_blocks: int, n_seqs: int
) -> None:
    """Any arrival times, lengths, budgets and pools: tokens and logprobs equal those of a lone request."""

    def add(engine: Engine, i: int) -> None:
        n_prompt, n_output, _, sampled = requests[i]
        prompt = np.random.default_rng(i).integers(0, VOCAB, n_prompt).astype(np.int32)
        sampling = params(max_tokens=n_output, temperature=float(sampled), seed=i, logprobs=2)
        engine.add_request(str(i), prompt, sampling)

    engine, plan = make_engine(max_tokens=max_tokens, n_blocks=n_blocks, max_num_seqs=n_seqs)
    together: dict[str, RequestOutput] = {}
    for tick in range(10_000):
        for i, (_, _, arrival, _) in enumerate(requests):
            if arrival == tick:
                add(engine, i)
        together.update((output.request_id, output) for output in engine.step())
        if tick > 20 and not engine.has_unfinished:
            break
    tables = engine.scheduler.tables
    assert tables.n_free == tables.n_available == n_blocks
    assert all(sum(rows) <= max_tokens and len(rows) <= n_seqs for rows in plan.steps)
    for i in range(len(requests)):
        alone, _ = make_engine(max_tokens=64)
        add(alone, i)
        (expected,) = run(alone).values()
        assert together[str(i)].outputs == expected.outputs


def test_decoding_goes_on_while_a_prompt_is_read() -> None:
    engine, plan = make_engine(max_tokens=8)
    engine.add_request("a", [1], params(max_tokens=12))
    engine.step()
    engine.add_request("b", [2] * 30, params(max_tokens=2))
    run(engine)
    assert plan.steps[:7] == [(1,), (1, 7), (1, 7), (1, 7), (1, 7), (1, 2), (1, 1)]


def test_seeds() -> None:
    def outputs(engine_seed: int, seeds: Sequence[int | None]) -> list[Sequence[int]]:
        engine, _ = make_engine(seed=engine_seed)
        for i, seed in enumerate(seeds):
            engine.add_request(str(i), [1], params(temperature=1.0, max_tokens=8, seed=seed))
        done = run(engine)
        return [done[str(i)].outputs[0].token_ids for i in range(len(seeds))]

    assert outputs(0, [5, 6, 5]) == outputs(9, [5, 6, 5])
    a, b, c = outputs(0, [5, 6, 5])
    assert a == c != b
    x, y = outputs(0, [None, None])
    assert x != y and [x, y] == outputs(0, [None, None]) and [x, y] != outputs(1, [None, None])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 64, "64 tokens, expected at most 63"),
        ([0, VOCAB], f"token id {VOCAB} at index 1"),
        ([-1], "token id -1"),
        ([1 << 40], "token id 1099511627776"),
        ([5, 1 << 80], "token id 1208925819614629174706176 at index 1"),
        ([5, 1.5], "has 1.5 at index 1, expected a token id"),
        (["a"], "has 'a' at index 0"),
        ([[1]], r"has \[1\] at index 0"),
        ([[1], [2, 3]], r"has \[1\] at index 0"),
        ([True], "has True at index 0"),
        ([5, None], "has None at index 1"),
        (np.array([0.5, 1.0]), "flat list"),
        ("text", "flat list"),
    ],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, params())
    assert not engine.has_unfinished


def test_bad_requests() -> None:
    engine, _ = make_engine(n_blocks=2, max_model_len=64)
    with pytest.raises(CapacityError, match="lower max_tokens"):
        engine.add_request("a", [1] * 20, params(max_tokens=40))
    with pytest.raises(RequestError, match="stop_token_ids has 97"):
        engine.add_request("a", [1], params(stop_token_ids=[VOCAB]))
    with pytest.raises(RequestError, match="priority is 'high'"):
        engine.add_request("a", [1], params(), priority="high")
    with pytest.raises(RequestError, match="cache_salt is ''"):
        engine.add_request("a", [1], params(), cache_salt="")
    engine.add_request("a", [1], params())
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [1], params())


def test_stats_count_steps_and_tokens() -> None:
    engine, _ = make_engine(max_tokens=4)
    engine.add_request("a", [1] * 6, params(max_tokens=3))
    run(engine)
    stats = engine.stats()
    assert (stats["n_steps"], stats["n_tokens"], stats["n_sampled"]) == (4, 8, 3)
    assert (stats["n_prompt_tokens"], stats["n_finished"], stats["n_running"]) == (6, {"length": 1}, 0)
    assert 0 < stats["run_s"] < stats["step_s"] and stats["python_s"] > 0


def test_completions_of_one_prompt() -> None:
    """n streams of random numbers over one prompt, which is read once; each equals itself run alone."""
    prompt = list(range(1, 41))
    engine, plan = make_engine(max_tokens=64, max_num_seqs=8, n_blocks=32)
    engine.add_request("a", prompt, params(temperature=1.0, seed=4, n=4, max_tokens=6, logprobs=0))
    done = run(engine)["a"]
    assert [c.index for c in done.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in done.outputs}) == 4
    assert done.finished and done.metrics.n_output_tokens == 24
    assert sum(map(sum, plan.steps)) <= 40 + 3 * 16 + 24  # shared but for the ends of blocks
    again, _ = make_engine(max_tokens=7, max_num_seqs=2, prefix_caching=False, kv_cache_type="contiguous")
    again.add_request("b", prompt, params(temperature=1.0, seed=4, n=4, max_tokens=6, logprobs=0))
    assert run(again)["b"].outputs == done.outputs


def test_cached_tokens_are_counted() -> None:
    prompt = list(range(50))
    engine, _ = make_engine(max_tokens=64)
    for name in "ab":
        engine.add_request(name, prompt, params(max_tokens=2))
        done = run(engine)
        assert done[name].num_cached_tokens == (0 if name == "a" else 48)
    assert engine.stats()["n_cached_tokens"] == 48
    engine.add_request("c", prompt, params(max_tokens=2), cache_salt="mine")
    assert run(engine)["c"].num_cached_tokens == 0


def test_the_queue_is_bounded() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_num_waiting=2)
    engine.add_request("a", [1], params(max_tokens=3))
    engine.step()
    engine.add_request("b", [1], params(max_tokens=3))
    engine.add_request("c", [1], params(max_tokens=3))
    with pytest.raises(QueueFullError, match="2 sequences wait, max_num_waiting is 2"):
        engine.add_request("d", [1], params(max_tokens=3))
    assert set(run(engine)) == {"a", "b", "c"}
    engine.add_request("d", [1], params(max_tokens=3))
    assert set(run(engine)) == {"d"}


def test_a_hundred_longest_requests_on_a_pool_for_two() -> None:
    for kind in ("slab", "paged", "contiguous"):
        for reserve in (False, True):
            engine, _ = make_engine(
                n_blocks=8, max_num_seqs=8, max_tokens=64, kv_cache_type=kind, reserve=reserve
            )
            for i in range(100):
                prompt = [i % VOCAB] * (1 + i % 40)
                engine.add_request(str(i), prompt, params(max_tokens=None))
            done = run(engine)
            assert engine.stats()["n_preemptions"] == 0 if reserve else engine.stats()["n_preemptions"] > 0
            for i in range(100):
                prompt = [i % VOCAB] * (1 + i % 40)
                assert done[str(i)].outputs[0].token_ids == greedy(prompt, 64 - len(prompt))
            assert engine.scheduler.tables.n_free == 8

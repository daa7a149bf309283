"""The engine over a fake model whose logits reveal every slip of batching, chunking and block tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes import VOCAB, LetterTokenizer, logits_of, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.driver import merged
from pace.engine.core import Engine
from pace.errors import CapacityError, ForkError, QueueFullError, RequestError
from pace.outputs import RequestOutput
from pace.params import RequestOutputKind, SamplingParams


def run(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of every request."""
    last = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            return last
        for output in engine.step():
            last[output.request_id] = output
    raise AssertionError("the engine does not finish")


def greedy(prompt: Sequence[int], n: int) -> list[int]:
    """What the fake model says, computed without an engine."""
    history = list(prompt)
    for _ in range(n):
        history.append(int(logits_of(history).argmax()))
    return history[len(prompt) :]


def params(**values: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "detokenize": False, **values})  # type: ignore[arg-type]  # values of a mapping, one type to mypy


def spelt(tokens: Sequence[int]) -> str:
    return b"".join(map(LetterTokenizer().token_bytes, tokens)).decode("utf-8", "replace")


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


@settings(max_examples=60, deadline=None)
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
        prompt = np.random.default_rng(i).integers(0, VOCAB, n_prompt)
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


def test_streaming_grows_and_ends_in_the_full_output() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [9, 9], params(max_tokens=8, detokenize=True), stream=True)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 9))
    assert [o.finished for o in outputs] == [False] * 7 + [True]
    texts = [o.outputs[0].text for o in outputs]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == spelt(greedy([9, 9], 8))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string(stream: bool, include: bool) -> None:
    text = spelt(greedy([5, 6], 20))
    stop = text[4:7]
    end = text.find(stop)
    engine, _ = make_engine()
    sampling = params(max_tokens=20, detokenize=True, stop=["@", stop], include_stop_str_in_output=include)
    engine.add_request("a", [5, 6], sampling, stream=stream)
    seen = []
    while engine.has_unfinished:
        seen += engine.step()
    completion = seen[-1].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == text[: end + 3 if include else end]
    assert len(completion.token_ids) == end + 3
    # A stream never shows what the stop string takes back.
    assert all(completion.text.startswith(output.outputs[0].text) for output in seen)


def test_min_tokens_hold_back_eos_stop_ids_and_stop_strings() -> None:
    free = greedy([5, 6], 20)
    eos, stop_id = free[2], free[4]
    engine, _ = make_engine(eos=[eos])
    engine.add_request("eos", [5, 6], params(max_tokens=20))
    engine.add_request("ignored", [5, 6], params(max_tokens=20, ignore_eos=True))
    engine.add_request("id", [5, 6], params(max_tokens=20, ignore_eos=True, stop_token_ids=[stop_id]))
    engine.add_request("min", [5, 6], params(max_tokens=20, min_tokens=12))
    engine.add_request(
        "text",
        [5, 6],
        params(max_tokens=9, ignore_eos=True, min_tokens=8, stop=[spelt(free)[1]], detokenize=True),
    )
    done = {key: output.outputs[0] for key, output in run(engine).items()}
    assert (done["eos"].token_ids, done["eos"].finish_reason, done["eos"].stop_reason) == (
        free[:3],
        "stop",
        None,
    )
    assert (done["ignored"].token_ids, done["ignored"].finish_reason) == (free, "length")
    assert (done["id"].token_ids, done["id"].stop_reason) == (free[: free.index(stop_id) + 1], stop_id)
    assert len(done["min"].token_ids) >= 12 and eos not in done["min"].token_ids[:11]
    assert len(done["text"].token_ids) == 9


def test_min_tokens_hold_back_an_eos_that_is_ignored() -> None:
    free = greedy([5, 6], 20)
    engine, _ = make_engine(eos=[free[2], free[4]])
    for name, values in (
        ("both", {"min_tokens": 8}),
        ("eos only", {"min_tokens": 8, "stop_token_ids": [3]}),
        ("none", {}),
    ):
        engine.add_request(name, [5, 6], params(max_tokens=20, ignore_eos=True, **values))
    done = {key: output.outputs[0].token_ids for key, output in run(engine).items()}
    assert done["none"] == free
    for name in ("both", "eos only"):
        assert not {free[2], free[4]} & set(done[name][:8]) and done[name][:2] == free[:2]


def test_only_the_models_first_eos_is_no_stop_reason() -> None:
    free = greedy([5, 6], 20)
    eos, end_of_turn = free[6], free[3]
    for ids, n, reason in (
        ([eos, end_of_turn], 4, end_of_turn),
        ([end_of_turn, eos], 4, None),
        ([eos], 7, None),
    ):
        engine, _ = make_engine(eos=ids)
        engine.add_request("r", [5, 6], params(max_tokens=20))
        engine.add_request("named", [5, 6], params(max_tokens=20, stop_token_ids=[ids[0]]))
        done = {key: output.outputs[0] for key, output in run(engine).items()}
        assert all(
            (len(c.token_ids), c.finish_reason, c.stop_reason) == (n, "stop", reason) for c in done.values()
        )
    engine, _ = make_engine(eos=[eos])
    engine.add_request("r", [5, 6], params(max_tokens=20, ignore_eos=True, stop_token_ids=[eos]))
    assert run(engine)["r"].outputs[0].stop_reason == eos


def test_logprobs_are_bounded_by_the_engine() -> None:
    engine, _ = make_engine(max_logprobs=5)
    for name in ("logprobs", "prompt_logprobs"):
        for n in (-1, 6, 1 << 30):
            with pytest.raises(RequestError, match=f"^{name} is {n}, expected at most 5; raise"):
                engine.add_request("r", [5], params(**{name: n}))
    engine.add_request("r", [5], params(logprobs=5))
    engine, _ = make_engine()
    request = engine.add_request("r", [5], params(logprobs=-1, prompt_logprobs=1 << 30))
    assert (request.params.logprobs, request.params.prompt_logprobs) == (VOCAB, VOCAB)


def test_text_leaves_the_stopping_token_out_unless_asked() -> None:
    free = greedy([5, 6], 8)
    engine, _ = make_engine()
    for include in (False, True):
        sampling = params(
            max_tokens=8, detokenize=True, stop_token_ids=[free[5]], include_stop_str_in_output=include
        )
        engine.add_request(str(include), [5, 6], sampling)
    done = run(engine)
    n = free.index(free[5])
    assert done["False"].outputs[0].text == spelt(free[:n])
    assert done["True"].outputs[0].text == spelt(free[: n + 1])
    assert list(done["False"].outputs[0].token_ids) == free[: n + 1]


@pytest.mark.parametrize("n_logprobs", [0, 1, 5])
def test_logprobs_have_vllms_shape(n_logprobs: int) -> None:
    engine, _ = make_engine()
    engine.add_request(
        "a", [7], params(max_tokens=6, temperature=1.0, seed=3, logprobs=n_logprobs, detokenize=True)
    )
    engine.add_request("b", [7], params(max_tokens=6, logprobs=3))
    done = run(engine)
    completion = done["a"].outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 6
    history = [7]
    total = 0.0
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = logits_of(history).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert next(iter(entries)) == token
        assert n_logprobs <= len(entries) <= n_logprobs + 1 or (n_logprobs == 0 and len(entries) == 1)
        assert {t for t, e in entries.items() if e.rank is not None and e.rank <= n_logprobs} == set(
            np.argsort(-exact, kind="stable")[:n_logprobs].tolist()
        )
        for t, entry in entries.items():
            assert entry.logprob == pytest.approx(exact[t], abs=1e-5)
            assert entry.rank == 1 + (exact > exact[t]).sum()
            assert entry.decoded_token == chr(97 + t % 26)
        total += entries[token].logprob
        history.append(token)
    assert completion.cumulative_logprob == pytest.approx(total)
    assert all(len(entries) == 3 for entries in done["b"].outputs[0].logprobs or [])


def test_a_failing_row_ends_alone() -> None:
    engine, plan = make_engine()
    plan.nan_token = 50
    engine.add_request("good", [1, 2], params(max_tokens=9))
    engine.add_request("nan", [50, 1], params(max_tokens=9))
    done = run(engine)
    assert done["good"].outputs[0].token_ids == greedy([1, 2], 9)
    bad = done["nan"].outputs[0]
    assert bad.finish_reason == "error" and "NaN" in str(bad.stop_reason) and not bad.token_ids
    assert done["nan"].finished
    assert engine.scheduler.tables.n_open == 0


def test_a_panicking_detokenizer_ends_its_request_alone() -> None:
    prompt = next([a, b] for a in range(VOCAB) for b in range(VOCAB) if greedy([a, b], 1) == [91])
    engine, _ = make_engine()
    engine.add_request("good", [1, 2], params(max_tokens=9))
    engine.add_request("bad", prompt, params(max_tokens=9, detokenize=True), stream=True)
    done = run(engine)
    assert done["good"].outputs[0].token_ids == greedy([1, 2], 9)
    assert done["bad"].outputs[0].finish_reason == "error"
    assert "91" in str(done["bad"].outputs[0].stop_reason)


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on() -> None:
    engine, plan = make_engine(max_num_seqs=1)
    engine.add_request("bad", [1], params(max_tokens=3))
    engine.add_request("good", [2], params(max_tokens=3))
    plan.crash = ValueError("the batch\ncontradicts itself")
    done = run(engine)
    assert done["bad"].outputs[0].stop_reason == "ValueError: the batch contradicts itself"
    assert done["good"].outputs[0].token_ids == greedy([2], 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ForkError])
def test_an_interrupted_step_can_be_repeated(error: type[BaseException]) -> None:
    engine, plan = make_engine(max_tokens=4)
    engine.add_request("a", [1, 2, 3, 4, 5, 6], params(max_tokens=9))
    for _ in range(4):
        plan.crash = error("stop")
        with pytest.raises(error):
            engine.step()
        engine.step()
    assert run(engine)["a"].outputs[0].token_ids == greedy([1, 2, 3, 4, 5, 6], 9)


def test_abort_of_waiting_and_running() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request("running", [1], params(max_tokens=20, detokenize=True))
    engine.add_request("waiting", [2], params(max_tokens=20))
    engine.add_request("last", [3], params(max_tokens=3))
    engine.step()
    engine.step()
    for name in ("waiting", "running", "unknown"):
        engine.abort(name)
    done = run(engine)
    assert done["running"].outputs[0].finish_reason == "abort"
    assert done["running"].outputs[0].token_ids == greedy([1], 2)
    assert done["running"].outputs[0].text == spelt(greedy([1], 2))
    assert done["waiting"].outputs[0].token_ids == []
    assert done["last"].outputs[0].token_ids == greedy([3], 3)
    assert engine.scheduler.tables.n_free == 16


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


def test_longest_sequence_and_no_max_tokens() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1] * 63, params(max_tokens=None))
    engine.add_request("b", [1] * 60, params(max_tokens=1000))
    done = run(engine)
    assert [len(done[name].outputs[0].token_ids) for name in "ab"] == [1, 4]
    assert done["b"].outputs[0].finish_reason == "length"


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


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_kinds_of_output(kind: RequestOutputKind) -> None:
    engine, _ = make_engine()
    sampling = params(max_tokens=6, detokenize=True, output_kind=kind, logprobs=0)
    engine.add_request("a", [4, 2], sampling, stream=True)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    expected = greedy([4, 2], 6)
    if kind is RequestOutputKind.DELTA:
        assert tokens == [[token] for token in expected]
        assert "".join(o.outputs[0].text for o in outputs) == spelt(expected)
        assert all(len(o.outputs[0].logprobs or []) == 1 for o in outputs)
    elif kind is RequestOutputKind.CUMULATIVE:
        assert tokens == [expected[:n] for n in range(1, 7)]
    else:
        assert tokens == [expected] and outputs[0].outputs[0].text == spelt(expected)


@pytest.mark.parametrize("max_tokens", [4, 12, 64])
def test_prompt_logprobs(max_tokens: int) -> None:
    """In chunks, beside others, and after the prompt was cached."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
    engine, _ = make_engine(max_tokens=max_tokens)
    engine.add_request("plain", prompt, params(max_tokens=2))
    run(engine)
    engine.add_request("other", [1, 2, 3], params(max_tokens=9))
    for name, n in (("two", 2), ("none", 0)):
        engine.add_request(name, prompt, params(max_tokens=2, prompt_logprobs=n))
    done = run(engine)
    for name, n in (("two", 2), ("none", 0)):
        entries = done[name].prompt_logprobs
        assert entries is not None and len(entries) == len(prompt) and entries[0] is None
        for i, entry in enumerate(entries[1:], 1):
            logits = logits_of(prompt[:i]).astype(np.float64)
            exact = logits - np.log(np.exp(logits).sum())
            assert entry is not None and next(iter(entry)) == prompt[i]
            assert entry[prompt[i]].logprob == pytest.approx(exact[prompt[i]], abs=1e-5)
            assert n <= len(entry) <= n + 1
        assert done[name].outputs[0].token_ids == greedy(prompt, 2)
    assert done["other"].prompt_logprobs is None
    assert done["two"].num_cached_tokens == 0


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_prompt_logprobs_come_once(kind: RequestOutputKind) -> None:
    """They were copied into every output of a stream, where clients that join deltas counted them twice."""
    engine, _ = make_engine(max_tokens=6)
    engine.add_request(
        "a", list(range(20)), params(max_tokens=4, prompt_logprobs=0, output_kind=kind), stream=True
    )
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    found = [output.prompt_logprobs for output in outputs]
    assert found[0] is not None and len(found[0]) == 20
    if kind is RequestOutputKind.DELTA:
        assert found[1:] == [None] * 3
        assert merged(merged(outputs[0], outputs[1]), outputs[2]).prompt_logprobs is found[0]
        assert merged(outputs[1], outputs[2]).prompt_logprobs is None
    else:
        assert all(one is found[0] for one in found)


def test_no_prompt_logprobs_before_all_are_known() -> None:
    engine, _ = make_engine(max_tokens=6)
    engine.add_request("a", list(range(20)), params(max_tokens=4, prompt_logprobs=0), stream=True)
    engine.add_request("b", list(range(20)), params(max_tokens=4, prompt_logprobs=0), stream=True)
    engine.step()
    engine.abort("a")
    (output,) = engine.step()
    assert output.request_id == "a" and output.prompt_logprobs is not None
    assert 1 < len(output.prompt_logprobs) < 20


def test_scored_rows_cost_what_plain_ones_do() -> None:
    """As many steps as without log probabilities, however few logits the plan keeps at a time."""
    steps = []
    for n in (None, 1):
        engine, plan = make_engine(max_num_seqs=8, max_tokens=64, n_blocks=64)
        for i in range(16):
            engine.add_request(str(i), [i] * 50, params(max_tokens=1, prompt_logprobs=n))
        run(engine)
        steps.append(plan.steps)
    assert steps[0] == steps[1] and len(steps[0]) == 13


def test_prompt_logprobs_survive_preemption() -> None:
    prompt = list(range(30))
    engine, _ = make_engine(n_blocks=4, max_num_seqs=3)
    for name in "abc":
        engine.add_request(name, prompt, params(max_tokens=30, prompt_logprobs=0))
    done = run(engine)
    assert engine.stats()["n_preemptions"] > 0
    assert all(len(output.prompt_logprobs or []) == 30 for output in done.values())
    assert {tuple(output.outputs[0].token_ids) for output in done.values()} == {tuple(greedy(prompt, 30))}


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


def test_a_deadline_ends_a_request_running_or_waiting() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    soon = time.monotonic() + 0.05
    engine.add_request("running", [1], params(max_tokens=50), deadline_s=soon)
    engine.add_request("waiting", [2], params(max_tokens=5), deadline_s=soon)
    engine.add_request("patient", [3], params(max_tokens=5), deadline_s=soon + 1000)
    done = {output.request_id: output for output in engine.step()}
    time.sleep(0.06)
    done |= run(engine)
    for name in ("running", "waiting"):
        assert (done[name].outputs[0].finish_reason, done[name].outputs[0].stop_reason) == (
            "abort",
            "deadline",
        )
    assert done["running"].outputs[0].token_ids == greedy([1], 1)
    assert done["patient"].outputs[0].token_ids == greedy([3], 5)


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


def test_a_step_that_fails_once_is_repeated_one_by_one() -> None:
    engine, plan = make_engine()
    for name in "abc":
        engine.add_request(name, [ord(name) % VOCAB], params(max_tokens=4))
    engine.step()
    plan.crash = MemoryError("for a moment")
    done = run(engine)
    assert all(done[name].outputs[0].token_ids == greedy([ord(name) % VOCAB], 4) for name in "abc")


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

"""What the engine's outputs hold: streams, kinds of output, log probabilities of tokens and prompts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from engine.fakes import VOCAB, greedy, logits_of, make_engine, params, run, spelt

from pace.driver import merged
from pace.errors import RequestError
from pace.params import RequestOutputKind


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

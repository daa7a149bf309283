"""How requests end in the engine: stops, lengths, aborts, deadlines, rows and steps that fail."""

from __future__ import annotations

import time

import pytest
from engine.fakes import VOCAB, greedy, make_engine, params, run, spelt

from pace.errors import ForkError


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


def test_longest_sequence_and_no_max_tokens() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1] * 63, params(max_tokens=None))
    engine.add_request("b", [1] * 60, params(max_tokens=1000))
    done = run(engine)
    assert [len(done[name].outputs[0].token_ids) for name in "ab"] == [1, 4]
    assert done["b"].outputs[0].finish_reason == "length"


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


def test_a_step_that_fails_once_is_repeated_one_by_one() -> None:
    engine, plan = make_engine()
    for name in "abc":
        engine.add_request(name, [ord(name) % VOCAB], params(max_tokens=4))
    engine.step()
    plan.crash = MemoryError("for a moment")
    done = run(engine)
    assert all(done[name].outputs[0].token_ids == greedy([ord(name) % VOCAB], 4) for name in "abc")

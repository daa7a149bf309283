"""What other threads ask of an engine that has thousands of requests."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
from engine.fakes import VOCAB, make_engine

from pace.engine.core import Engine
from pace.engine.heap import MIN_DEAD
from pace.engine.intake import MIN_ENDS
from pace.engine.request import Request
from pace.engine.sequence import Sequence
from pace.errors import QueueFullError, RequestError
from pace.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)


def fill(engine: Engine, n: int, **options: object) -> None:
    for i in range(n):
        engine.add_request(str(i), [i % VOCAB], GREEDY, **options)


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_ends_of_those_that_wait_are_spread_over_steps() -> None:
    """Aborting 20 000 in one step stalled everybody for half a second; now those that run go on, and nobody else starts."""
    engine, plan = make_engine(max_num_seqs=2)
    engine.add_request("goes on", [1], SamplingParams(temperature=0.0, max_tokens=40, detokenize=False))
    engine.add_request("runs", [2], SamplingParams(temperature=0.0, max_tokens=40, detokenize=False))
    engine.step()
    engine._usual_s = 0.0
    fill(engine, 200)
    for i in range(200):
        engine.abort(str(i))
    engine.abort("runs")
    outputs = engine.step()
    assert "runs" in {output.request_id for output in outputs}
    n_ended = [len(outputs)]
    while len(engine.intake.requests) > 1:
        engine._usual_s = 0.0
        n_ended.append(len(engine.step()))
    assert n_ended == [MIN_ENDS + 1, *[MIN_ENDS] * 11, 200 % MIN_ENDS]
    assert all(rows == (1,) for rows in plan.steps[1:]), "what was aborted has started"
    assert engine.n_waiting == 0


def test_long_steps_end_more_of_them() -> None:
    engine, _ = make_engine()
    fill(engine, 200)
    for i in range(200):
        engine.abort(str(i))
    engine._usual_s = 5.0
    assert len(engine.step()) == 200 and not engine.has_unfinished


def test_late_requests_are_spread_over_steps_too() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request("runs", [1], GREEDY)
    engine.step()
    engine._usual_s = 0.0
    fill(engine, 50, deadline_s=time.monotonic() - 1.0)
    assert len(engine.step()) == MIN_ENDS


def test_nothing_dead_is_kept_behind_a_blocked_head() -> None:
    """270 aborted requests stayed in the queue for one that lived, and escaped max_num_waiting's purpose."""
    engine, _ = make_engine(max_num_seqs=1, max_num_waiting=100)
    engine.add_request("runs", [1], SamplingParams(temperature=0.0, max_tokens=60, detokenize=False))
    engine.step()
    engine.add_request("head", [1], GREEDY)
    before = alive(Sequence), alive(Request)
    for i in range(400):
        engine.add_request(str(i), [2], GREEDY, deadline_s=time.monotonic() + 1e6)
        engine.abort(str(i))
        for request, reason in engine.intake.receive(1.0):
            engine.committer.end(request, reason)
        engine.committer.tell([])
    del request
    assert (alive(Sequence), alive(Request)) == before
    queue = engine.scheduler._queue
    for heap in (queue._by_key, queue._by_length, engine.intake._deadlines):
        assert len(heap._heap) <= 2 + MIN_DEAD
    assert engine.n_waiting == 1


def test_a_finished_request_is_released_before_an_older_deadline() -> None:
    """Finished requests were kept until deadlines that came before theirs had passed: 638 for one alive."""
    engine, _ = make_engine()
    soon = time.monotonic() + 1e5
    engine.add_request("old", [1] * 20, SamplingParams(max_tokens=40, detokenize=False), deadline_s=soon)
    engine.step()
    before = alive(Request)
    for i in range(12):
        engine.add_request(str(i), [2], GREEDY, deadline_s=soon + 1 + i)
        while str(i) in engine.intake.requests:
            engine.step()
    assert alive(Request) == before


def test_a_waiting_request_is_few_objects() -> None:
    """Adding 20 000 took 48 us each, most of it the garbage collector's, which walked lists of ids and 20 objects each."""
    engine, _ = make_engine()
    params = SamplingParams(temperature=0.0, max_tokens=3, stop=["x"], logprobs=1)
    engine.add_request("first", np.ones(50, np.int32), params)
    gc.collect()
    before = len(gc.get_objects())
    for i in range(100):
        engine.add_request(str(i), np.ones(50, np.int32), params)
    assert list(engine.intake.receive(1.0)) == []
    gc.collect()  # which lets go of tuples and dicts that hold nothing to walk
    assert len(gc.get_objects()) - before <= 100 * 3 + 10


def test_the_callers_array_may_change() -> None:
    engine, _ = make_engine()
    prompt = np.ones(5, np.int32)
    engine.add_request("a", prompt, GREEDY)
    prompt[:] = 7
    outputs = [output for _ in range(3) for output in engine.step()]
    assert outputs[-1].prompt_token_ids == [1] * 5


def test_an_accepted_request_that_never_arrived_can_be_cancelled() -> None:
    """As Ctrl-C between two lines of submit may leave it."""
    engine, _ = make_engine()
    request = engine.prepare("a", [1], GREEDY)
    engine.intake.requests["a"] = request
    engine.cancel(request)
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "abort" and engine.n_waiting == 0
    engine.cancel(request)
    engine.cancel(engine.prepare("b", [1], GREEDY))
    assert engine.step() == [] and not engine.intake.has_ends


def test_a_refused_request_leaves_nothing() -> None:
    engine, _ = make_engine(max_num_waiting=1)
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(QueueFullError):
        engine.add_request("b", [1], GREEDY)
    assert list(engine.intake.requests) == ["a"]
    engine.step()
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [1], GREEDY)
    assert engine.n_waiting == 0


@pytest.mark.parametrize("priority", [np.int64(-1), np.uint8(3), 10**400, -(10**400)])
def test_any_integer_is_a_priority(priority: int) -> None:
    engine, _ = make_engine()
    request = engine.add_request("a", [1], GREEDY, priority=priority)
    assert request.seqs[0].priority == priority and type(request.seqs[0].priority) is int
    engine.add_request("b", [1], GREEDY)
    while engine.has_unfinished:
        engine.step()


@pytest.mark.parametrize("priority", [True, np.bool_(True), 1.0, "1", None])
def test_nothing_else_is_a_priority(priority: object) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match="priority is"):
        engine.add_request("a", [1], GREEDY, priority=priority)

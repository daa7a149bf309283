"""Several callers of one façade: threads, suspended and dropped streams, forks, interrupts, faults, the end."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from llm.kit import GREEDY, answers

from pace.errors import EngineDeadError, ForkError, PaceError
from pace.llm import LLM
from pace.outputs import RequestOutput
from pace.params import SamplingParams


def test_a_dropped_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("x", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.stats()["n_running"] == 1
    stream.close()
    llm.generate("y", GREEDY)
    stats = llm.stats()
    assert stats["n_running"] == 0 and stats["n_free_blocks"] == stats["n_blocks"]
    assert stats["kv_usage"] == 0


def test_callers_in_threads_share_steps_and_keep_their_answers(llm: LLM) -> None:
    expected = [llm.generate(f"thread {i}", GREEDY)[0].outputs for i in range(6)]
    found: list[Any] = [None] * 6

    def work(i: int) -> None:
        for _ in range(5):
            if i % 2:
                found[i] = llm.generate(f"thread {i}", GREEDY)[0].outputs
            else:
                *_, last = llm.stream(f"thread {i}", GREEDY)
                found[i] = last.outputs

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_suspended_stream_does_not_block_others(llm: LLM) -> None:
    stream = llm.stream("slow reader", GREEDY)
    first = next(stream)
    (whole,) = llm.generate("slow reader", GREEDY)
    assert llm.generate("another", GREEDY)
    *_, last = stream
    assert first.outputs[0].token_ids == whole.outputs[0].token_ids[:1]
    assert last.outputs == whole.outputs


def test_closed(model: Path) -> None:
    llm = LLM(model, threads=1)
    stream = llm.stream("a", GREEDY)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("a"), lambda: next(stream)):
        with pytest.raises(PaceError, match="closed"):
            call()


def test_forked_child_gets_an_error(llm: LLM) -> None:
    stream = llm.stream("a", GREEDY)
    next(stream)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            llm.generate("a", GREEDY)
        except ForkError:
            os.write(write, b"ForkError")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"ForkError"
    os.waitpid(pid, 0)
    assert len(list(stream)) == 11


def test_an_interrupt_ends_its_own_requests_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = llm.generate("other", GREEDY)
    other = llm.stream("other", GREEDY)
    next(other)
    step = llm.engine.step
    n_steps = itertools.count()

    def interrupting() -> list[RequestOutput]:
        if next(n_steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"] * 1000, SamplingParams(max_tokens=400, ignore_eos=True))
    monkeypatch.undo()
    assert llm.stats()["n_running"] <= 1
    *_, last = other
    assert last.outputs == whole.outputs
    assert not llm.engine.has_unfinished and llm.stats()["n_running"] == 0


def test_more_prompts_than_the_queue_holds(model: Path) -> None:
    prompts = [f"prompt {i}" for i in range(60)]
    with LLM(model, threads=1, max_num_seqs=4, max_num_waiting=3) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert [o.prompt for o in outputs] == prompts
        assert answers(outputs[59:]) == answers(llm.generate("prompt 59", GREEDY))
        found: list[Any] = [None] * 4

        def work(i: int) -> None:
            found[i] = answers(llm.generate(prompts[:20], GREEDY))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [answers(outputs[:20])] * 4


def test_a_fault_of_the_engine_ends_everybody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, threads=1) as llm:
        other = llm.stream("other", GREEDY)
        next(other)
        monkeypatch.setattr(llm.engine, "step", lambda: 1 // 0)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"ZeroDivisionError: .*build a new one"):
                llm.generate("a", GREEDY)
        with pytest.raises(EngineDeadError):
            list(other)


def test_two_engines_in_one_process(llm: LLM, model: Path) -> None:
    with LLM(model, threads=1) as other:
        first, second = llm.stream("a", GREEDY), other.stream("a", GREEDY)
        pairs = list(zip(first, second, strict=True))
    assert all(a.outputs == b.outputs for a, b in pairs)

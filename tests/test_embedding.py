"""pace inside somebody else's program: threads, event loops, Ctrl-C, fork, spawn, exit; and no side effects."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from pace import ops
from pace.async_llm import AsyncLLM
from pace.engine.loader import Loaded
from pace.errors import EngineDeadError, ForkError, PaceError, RequestError
from pace.inputs import deadline
from pace.llm import LLM
from pace.outputs import RequestOutput
from pace.params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [f"prompt {i} " * (1 + i % 3) for i in range(8)]
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(model: Path) -> list[Any]:
    """The outputs of PROMPTS, one after the other."""
    with LLM(model, threads=1) as llm:
        return [llm.generate(prompt, GREEDY)[0].outputs for prompt in PROMPTS]


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once; their errors are raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


async def answers(llm: AsyncLLM) -> list[Any]:
    async def answer(prompt: str) -> Any:
        return [output.outputs async for output in llm.generate(prompt, GREEDY)][-1]

    return await asyncio.gather(*map(answer, PROMPTS))


def script(source: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which must end well and quietly."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", source, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done


def test_two_engines_at_the_same_time(model: Path, alone: list[Any]) -> None:
    with LLM(model, threads=2) as first, LLM(model, threads=1, max_num_seqs=3) as second:

        def work(llm: LLM) -> None:
            for _ in range(5):
                assert [output.outputs for output in llm.generate(PROMPTS, GREEDY)] == alone

        in_threads(lambda: work(first), lambda: work(second))


def test_many_threads_share_one_engine(model: Path, alone: list[Any]) -> None:
    with LLM(model, threads=2, max_num_seqs=5) as llm:

        def generate() -> None:
            assert [output.outputs for output in llm.generate(PROMPTS, GREEDY)] == alone

        def stream() -> None:
            for prompt, want in zip(PROMPTS, alone, strict=True):
                *_, last = llm.stream(prompt, GREEDY)
                assert last.outputs == want

        in_threads(*[generate, stream] * 4)


def test_two_event_loops_share_one_engine(model: Path, alone: list[Any]) -> None:
    with_loops = AsyncLLM(model, threads=2, max_num_seqs=5)

    def work() -> None:
        for _ in range(3):
            assert asyncio.run(answers(with_loops)) == alone

    in_threads(work, work)
    with_loops.close()


def test_sync_and_async_beside_each_other(model: Path, alone: list[Any]) -> None:
    async def main() -> None:
        with LLM(model, threads=1) as llm:
            async with AsyncLLM(model, threads=1) as async_llm:
                found, outputs = await asyncio.gather(
                    answers(async_llm), asyncio.to_thread(llm.generate, PROMPTS, GREEDY)
                )
        assert found == alone and [output.outputs for output in outputs] == alone

    asyncio.run(main())


INTERRUPTED = """
import os, signal, sys, threading
from pace import LLM, SamplingParams

llm = LLM(sys.argv[1], threads=2, max_num_seqs=4)
short = SamplingParams(temperature=0, max_tokens=10)
want = llm.generate("after", short)[0].outputs
for delay_s in (0.003, 0.01, 0.02, 0.05, 0.1):
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        llm.generate(["x"] * 500, SamplingParams(max_tokens=400, ignore_eos=True))
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    assert not llm.engine.has_unfinished, "requests were left behind"
    assert llm.stats()["n_running"] == 0
    assert llm.generate("after", short)[0].outputs == want
"""


def test_ctrl_c_during_generate(model: Path) -> None:
    script(INTERRUPTED, model)


INTERRUPTED_ASYNC = """
import asyncio, os, signal, sys, threading
from pace import AsyncLLM, SamplingParams

llm = AsyncLLM(sys.argv[1], threads=2, max_num_seqs=4)

async def one(prompt, n):
    async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)):
        pass
    return output.outputs

async def many():
    asyncio.get_running_loop().slow_callback_duration = 60  # else -X dev says on stderr that the machine is busy
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    await asyncio.gather(*(one("x" * i, 500 - i) for i in range(1, 100)))

async def after():
    while llm.engine.has_unfinished:
        await asyncio.sleep(0.001)
    return await one("after", 10)

want = asyncio.run(after())
for _ in range(3):
    try:
        asyncio.run(many())
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    assert asyncio.run(after()) == want
"""


def test_ctrl_c_under_asyncio(model: Path) -> None:
    script(INTERRUPTED_ASYNC, model)


FORGOTTEN = """
import asyncio, sys, threading
from pace import LLM, AsyncLLM, SamplingParams

long = SamplingParams(max_tokens=400, ignore_eos=True)
llm, async_llm = LLM(sys.argv[1], threads=2), AsyncLLM(sys.argv[1], threads=2)
stream = llm.stream("x", long)
next(stream)

async def main():
    generator = async_llm.generate("x", long)
    await anext(generator)

asyncio.run(main())
loop = asyncio.new_event_loop()
pending = async_llm.generate("y", long)
loop.run_until_complete(anext(pending))
if len(sys.argv) > 2:
    def work():
        try:
            while True:
                llm.generate(["z"] * 100, long)
        except Exception as error:
            print(error)
    threading.Thread(target=work, daemon=True).start()
loop.close()
print("end")
"""


@pytest.mark.parametrize("busy", [(), ("busy",)])
def test_a_program_ends_without_closing_anything(model: Path, busy: tuple[str, ...]) -> None:
    assert "end" in script(FORGOTTEN, model, *busy).stdout


FORKED = """
import asyncio, gc, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on Python warns of any fork beside threads
from pace import LLM, AsyncLLM, SamplingParams
from pace.errors import ForkError

params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
llm, async_llm = LLM(sys.argv[1], threads=2), AsyncLLM(sys.argv[1], threads=2)
stream = llm.stream("x", params)
next(stream)

async def last(prompt):
    async for output in async_llm.generate(prompt, params):
        pass
    return output.outputs

want = asyncio.run(last("x"))
pid = os.fork()
if pid == 0:
    n_errors = 0
    for call in (
        lambda: llm.generate("x"), lambda: llm.generate([]), lambda: next(stream), lambda: llm.stream("x"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: asyncio.run(last("x")), lambda: asyncio.run(async_llm.abort("x")),
    ):
        try:
            call()
        except ForkError:
            n_errors += 1
    llm.close()
    async_llm.close()
    del llm, async_llm, stream
    gc.collect()
    sys.exit(0 if n_errors == 7 else 1)
assert os.waitpid(pid, 0)[1] == 0
*_, output = stream
assert output.outputs == want == asyncio.run(last("x"))
"""


def test_a_forked_child_gets_errors_and_the_parent_goes_on(model: Path) -> None:
    script(FORKED, model)


def spawned(
    model: Path, options: dict[str, Any], prompts: list[str], params: SamplingParams, pipe: Any
) -> None:
    """In the child: everything it needs came through pickle, and so do the outputs."""
    with LLM(model, **options) as llm:
        pipe.send(llm.generate(prompts, params))


def test_spawn(model: Path, alone: list[Any]) -> None:
    context = multiprocessing.get_context("spawn")
    with LLM(model, threads=1) as llm:  # the parent's own engine doesn't matter
        ours, theirs = context.Pipe()
        child = context.Process(target=spawned, args=(model, {"threads": 1}, PROMPTS, GREEDY, theirs))
        child.start()
        theirs.close()
        assert ours.poll(TIMEOUT_S)
        outputs = ours.recv()
        child.join(TIMEOUT_S)
        assert child.exitcode == 0
        assert [output.outputs for output in outputs] == alone
        assert llm.generate(PROMPTS[:1], GREEDY)[0].outputs == alone[0]


def test_what_goes_in_and_comes_out_pickles(model: Path) -> None:
    params = SamplingParams(
        temperature=0.5, seed=3, stop=["x"], logprobs=2, output_kind=RequestOutputKind.FINAL_ONLY
    )
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params and copy.explicit == params.explicit
    assert copy.output_kind is RequestOutputKind.FINAL_ONLY
    with LLM(model, threads=1) as llm:
        (output,) = llm.generate("pickle me", params)
    again = pickle.loads(pickle.dumps(output))
    assert isinstance(again, RequestOutput) and again == output
    for error in (ForkError("a"), EngineDeadError("b")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


NO_SIDE_EFFECTS = """
import sys
import asyncio, faulthandler, logging, os, signal, threading, warnings

def state():
    handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
    root = logging.getLogger()
    logs = root.level, list(root.handlers), logging.getLogger("pace").level, logging.raiseExceptions
    policy = type(asyncio.get_event_loop_policy())
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    other = os.getcwd(), os.umask(0o22), sys.getswitchinterval(), faulthandler.is_enabled(), policy
    return handlers, logs, hooks, other, dict(os.environ), sorted(os.sched_getaffinity(0))

start, n_threads = state(), threading.active_count()
import pace
assert state() == start and threading.active_count() == n_threads, "importing pace changes something"
assert "pace.llm" not in sys.modules and "tokenizers" not in sys.modules
from pace import LLM, AsyncLLM, SamplingParams
assert state() == start and threading.active_count() == n_threads
llm, async_llm = LLM(sys.argv[1], threads=2), AsyncLLM(sys.argv[1], threads=2)
assert state() == start, "building an engine changes something"

async def main():
    async for _ in async_llm.generate("x" * 400, SamplingParams(max_tokens=5)):
        pass

llm.generate(["x"] * 3, SamplingParams(max_tokens=5))
asyncio.run(main())
signal.set_wakeup_fd(-1)
assert state() == start, "running an engine changes something"
n_tasks = len(os.listdir("/proc/self/task"))
llm.close()
async_llm.close()
assert state() == start
assert threading.active_count() == n_threads, threading.enumerate()
assert len(os.listdir("/proc/self/task")) < n_tasks
assert not any(t.name.startswith("pace") for t in threading.enumerate())
"""


def test_nothing_of_the_process_is_changed(model: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PACE_")}
    assert script(NO_SIDE_EFFECTS, model, env=environ).stdout == ""


def test_importing_asyncio_is_left_to_those_who_need_it() -> None:
    source = (
        "import sys, pace; print(*sorted({'asyncio', 'pace.async_llm', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_threads_are_left(model: Path) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        with LLM(model, threads=2) as llm:
            llm.generate("x", GREEDY)
        async_llm = AsyncLLM(model, threads=2)
        asyncio.run(answers(async_llm))
        async_llm.close()
    assert set(threading.enumerate()) == before


def test_ctrl_c_stops_within_a_step(model: Path) -> None:
    """Measured where a step is long: the interrupt is noticed during it, the requests end with it."""
    with LLM(model, threads=1) as llm:
        step = llm.engine.step

        def slow_step() -> list[RequestOutput]:
            time.sleep(0.1)
            return step()

        llm.engine.step = slow_step  # type: ignore[method-assign]  # a test's in its place
        sent_s = []

        def interrupt() -> None:
            sent_s.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.25, interrupt)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["a", "b"], GREEDY)
        finally:
            timer.cancel()
        assert time.monotonic() - sent_s[0] < 0.5  # the rest of this step and the one that ends them
        assert not llm.engine.has_unfinished


def alive(*kinds: type) -> int:
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


def test_close_gives_the_memory_back(model: Path) -> None:
    """Weights, activations and KV cache stayed with an LLM that was closed."""
    gc.collect()
    kinds = (ops.Plan, ops.KVPool, ops.PackedMatrix)
    before = alive(*kinds)
    with LLM(model, threads=1) as llm:
        llm.generate("x", GREEDY)
        stats = llm.stats()
        assert alive(*kinds) > before + 2
    assert alive(*kinds) == before, "without the garbage collector's help"
    assert llm.stats() == stats and not llm.engine.has_unfinished
    llm.loaded.close()
    with pytest.raises(PaceError, match="closed"):
        llm.engine.add_request("a", [1], GREEDY)
    with pytest.raises(PaceError, match="closed"):
        llm.engine.step()


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_an_engine_says_that_it_can_not_be_pickled(model: Path, kind: Any) -> None:
    llm = kind(model, threads=1)
    try:
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(
                TypeError, match=f"this {kind.__name__} can't be pickled or copied: its threads"
            ):
                copied(llm)
    finally:
        llm.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_readers_learn_of_the_end_though_giving_memory_back_fails(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They waited for ever: they were told after the release, which had raised."""
    close = Loaded.close

    def broken(loaded: Loaded) -> None:
        close(loaded)
        raise RuntimeError("broken")

    monkeypatch.setattr(Loaded, "close", broken)
    llm = LLM(model, threads=1)

    def reader() -> None:
        with pytest.raises(PaceError, match="closed"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=400, ignore_eos=True))

    def closer() -> None:
        while not llm.engine.has_unfinished:
            time.sleep(0.001)
        llm.close()

    in_threads(reader, closer)


def test_a_submit_that_fails_leaves_no_ticket(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only PaceErrors were expected of it."""
    with LLM(model, threads=1) as llm:
        submit = llm.engine.submit

        def before(*args: Any, **options: Any) -> None:
            raise MemoryError

        def after(*args: Any, **options: Any) -> None:
            submit(*args, **options)
            raise KeyboardInterrupt

        for interrupted, error in ((before, MemoryError), (after, KeyboardInterrupt)):
            monkeypatch.setattr(llm.engine, "submit", interrupted)
            with pytest.raises(error):
                llm.generate("x", GREEDY)
            with pytest.raises(error):
                next(llm.stream("x", GREEDY))
            monkeypatch.setattr(llm.engine, "submit", submit)
            (output,) = llm.generate("y", GREEDY)
            assert output.outputs[0].finish_reason == "length"
            assert llm._driver._tickets == {} and not llm.engine.has_unfinished


def test_threads_are_served_in_the_order_in_which_they_came(model: Path) -> None:
    """With a full queue whoever asked at the right moment was next."""
    with LLM(model, threads=1, max_num_seqs=1, max_num_waiting=2) as llm:
        ends: dict[int, list[float]] = {}
        begun = [threading.Event() for _ in range(4)]
        begun[0].set()
        n_submitted = 0
        submit = llm.engine.submit

        def counted(*args: Any, **options: Any) -> None:
            nonlocal n_submitted
            submit(*args, **options)
            n_submitted += 1
            begun[(n_submitted + 10) // 20].set()  # the caller has submitted half of its own

        llm.engine.submit = counted  # type: ignore[method-assign]  # a test's in its place

        def work(i: int) -> None:
            assert begun[i].wait(TIMEOUT_S)
            outputs = llm.generate(["x"] * 20, GREEDY)
            ends[i] = [output.metrics.finished_s or 0.0 for output in outputs]

        in_threads(*(partial(work, i) for i in range(3)))
    assert max(ends[0][:10]) < min(ends[1]) and max(ends[1][:10]) < min(ends[2])
    assert all(one == sorted(one) for one in ends.values())


@pytest.mark.parametrize("timeout_s", [10**400, -(10**400), True, "1", b"1", [], 0, float("nan")])
def test_no_number_of_seconds(model: Path, timeout_s: Any) -> None:
    with pytest.raises(RequestError, match="timeout_s is"):
        deadline(timeout_s)


@pytest.mark.parametrize("timeout_s", [np.int64(3), np.float32(3.0), Fraction(3), 3])
def test_any_number_of_seconds(timeout_s: Any) -> None:
    assert 2.0 < (deadline(timeout_s) or 0.0) - time.monotonic() < 3.1

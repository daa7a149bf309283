"""The thread team: turns, closing, pinning, signals, forks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ext.kit import Packed, python, rng, sample_params
from ext.preload import preloading
from golden import tiny
from golden.harness import prefill

from pace import ops
from pace.errors import ConfigError

PackedModel = Callable[[str], Packed]


@pytest.mark.parametrize(
    ("n_threads", "cpus", "message"),
    [
        (0, None, "n_threads is 0"),
        (-1, None, "n_threads is -1"),
        (2000, None, "n_threads is 2000, expected 1 to 1024"),
        (2, [0], "1 cpus for 2 threads"),
        (1, [8000], "8000"),
        (1, [-1], "-1"),
    ],
)
def test_teams_refused(n_threads: int, cpus: list[int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        ops.Team(n_threads, cpus)
    assert "\n" not in str(info.value)


def test_closed_team(packed_model: PackedModel) -> None:
    team = ops.Team(2)
    runner = packed_model("llama-mha").runner(team)
    prefill(runner, [1, 2, 3])
    team.close()
    team.close()
    for call in (
        lambda: prefill(runner, [1, 2, 3]),
        lambda: ops.sample(team, np.zeros((1, 8), np.float32), sample_params(1), [None]),
        lambda: ops.PackedMatrix(team, 32, 32).pack(np.zeros((32, 32), np.float32), "f32"),
        lambda: ops.roof_dot(team, "bf16", iterations=10),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@pytest.mark.parametrize("use", ["step", "sample", "pack", "roof"])
def test_closing_while_another_thread_runs(packed_model: PackedModel, use: str) -> None:
    """close() waits for the run in progress, and whoever comes later is told: nobody hangs or reads freed memory."""
    runner_of = packed_model("llama-mha").runner
    x, params = np.zeros((8, 307), np.float32), sample_params(8)
    rows = np.ones((64, 64), np.float32)
    for delay in (0.0, 0.0002, 0.001, 0.003) * 2:
        team = ops.Team(3)
        runner, matrix = runner_of(team), ops.PackedMatrix(team, 64, 64)
        uses: dict[str, Callable[[], object]] = {
            "step": partial(prefill, runner, [1, 2, 3]),
            "sample": partial(ops.sample, team, x, params, [None] * 8),
            "pack": partial(matrix.pack, rows, "f32"),
            "roof": partial(ops.roof_dot, team, "f32", iterations=100),
        }
        endings: list[str] = []
        began = threading.Event()

        def run(call: Callable[[], object], began: threading.Event, endings: list[str]) -> None:
            try:
                while True:
                    call()
                    began.set()
            except RuntimeError as error:
                endings.append(str(error))

        threads = [
            threading.Thread(target=run, args=(uses[use], began, endings), daemon=True),
            threading.Thread(target=run, args=(uses["sample"], began, endings), daemon=True),
        ]
        for thread in threads:
            thread.start()
        assert began.wait(10)
        time.sleep(delay)
        closers = [threading.Thread(target=team.close, daemon=True) for _ in range(2)]
        for thread in closers:
            thread.start()
        for thread in [*closers, *threads]:
            thread.join(10)
            assert not thread.is_alive(), "hangs"
        assert endings == ["the thread team is closed"] * 2


def test_a_larger_vocabulary_leaves_the_scratch_of_a_smaller_alone() -> None:
    """Two threads sample on one team: the scratch that one's rows need grows only in its own turn."""
    team = ops.Team(3)
    params = sample_params(24, top_p=0.9, temperature=1.5, seed=np.arange(24))
    small = (3 * rng("scratch").standard_normal((24, 4000))).astype(np.float32)
    want = ops.sample(team, small, params, [None] * 24).tokens.tobytes()
    done = threading.Event()
    got: set[bytes] = set()

    def draw() -> None:
        while not done.is_set():
            got.add(ops.sample(team, small, params, [None] * 24).tokens.tobytes())

    thread = threading.Thread(target=draw)
    thread.start()
    for vocab in range(5_000, 60_000, 1_000):
        ops.sample(team, np.zeros((1, vocab), np.float32), sample_params(1), [None])
    done.set()
    thread.join(30)
    assert got == {want}
    team.close()


MASKS = """
import json
from pathlib import Path
from pace import ops
team = ops.Team(3)
ops.roof_dot(team, "f32", iterations=10)  # they have all started
masks = {}
for task in Path("/proc/self/task").iterdir():
    lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
    masks[lines["Name"].strip()] = int(lines["SigBlk"], 16)
print(json.dumps(masks))
"""


def test_workers_see_faults_and_no_other_signal() -> None:
    """A blocked SIGSEGV kills the process without its handler; any other signal belongs to the host's own threads."""
    masks = json.loads(python(MASKS, OPENBLAS_NUM_THREADS="1").stdout)
    faults = {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGABRT,
    }
    for name in ("pace-1", "pace-2"):
        free = {s for s in signal.valid_signals() if s < signal.SIGRTMIN and not masks[name] >> (s - 1) & 1}
        assert free - {signal.SIGKILL, signal.SIGSTOP} == faults


FAULT = """
import ctypes, faulthandler, mmap
import numpy as np
from ext.kit import sample_params
from pace import ops
faulthandler.enable()
team = ops.Team(2)
rows, vocab = 20_000, 4096
memory = mmap.mmap(-1, 4 * rows * vocab)
logits = np.frombuffer(memory, np.float32).reshape(rows, vocab)
# The first row of the worker's half: the caller comes to it last of all, when the worker has long been there.
ctypes.CDLL(None).mprotect(ctypes.c_void_p(logits[rows // 2 :].ctypes.data), mmap.PAGESIZE, 0)
ops.sample(team, logits, sample_params(rows, temperature=0.0), [None] * rows)
"""


def test_faulthandler_speaks_when_a_worker_faults() -> None:
    done = python(FAULT)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "most recent call first" in done.stderr


def test_pinning_leaves_the_caller_alone(packed_model: PackedModel) -> None:
    allowed = os.sched_getaffinity(0)
    team = ops.Team(1, [min(allowed)])
    prefill(packed_model("llama-mha").runner(team), [1, 2, 3])
    assert os.sched_getaffinity(0) == allowed
    team.close()


def test_two_teams_at_once(packed_model: PackedModel) -> None:
    """Two threads step two engines at the same time; each gets its own bytes."""
    model, tokens = packed_model("llama-gqa4-tied"), tiny.prompt("llama-gqa4-tied")
    teams = [ops.Team(2), ops.Team(2)]
    prompts = [tokens, tokens[::-1]]
    wants = [prefill(model.runner(teams[0]), prompt).tobytes() for prompt in prompts]
    failures: list[str] = []

    def run(i: int) -> None:
        runner = model.runner(teams[i])
        for _ in range(30):
            if prefill(runner, prompts[i]).tobytes() != wants[i]:
                failures.append(f"thread {i}")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    for team in teams:
        team.close()


def test_one_team_from_two_threads(packed_model: PackedModel, team: ops.Team) -> None:
    """Callers take turns: two plans share one team."""
    model, tokens = packed_model("llama-mha"), tiny.prompt("llama-mha")
    want = prefill(model.runner(team), tokens).tobytes()
    results: list[bytes] = []

    def run() -> None:
        runner = model.runner(team)
        results.extend(prefill(runner, tokens).tobytes() for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [want] * 40


def test_the_gil_is_free_during_a_step() -> None:
    """A Python thread keeps counting while the team works for 0.2 s or more."""
    team = ops.Team(1)
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    iterations = 2_000_000
    while True:
        before, begin = ticks, time.perf_counter()
        ops.roof_dot(team, "f32", iterations=iterations)
        if time.perf_counter() - begin > 0.2:
            break
        iterations *= 2
    during = ticks - before
    stop.set()
    thread.join()
    team.close()
    assert during > 10


def test_an_idle_team_burns_no_cpu(packed_model: PackedModel) -> None:
    """Its threads sleep: less than 20 ms of CPU in 0.3 s (a spinning pair would take 300)."""
    team = ops.Team(3)
    prefill(packed_model("llama-mha").runner(team), [1, 2, 3])
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02
    team.close()


FORK = """
import os, sys, json
import numpy as np
from ext.kit import build, rows_batch
from pace import ops
from pace.errors import ForkError
from pace.models import plan as ir

team = ops.Team(2)
slots = [ir.Slot("x", 8, "f32", "tokens"), ir.Slot("y", 8, "f32", "tokens")]
plan = build(team, [ir.Norm("n", "x", "y", "w")], slots, {"w": np.ones(8, np.float32)})
plan.step(rows_batch(3))
pid = os.fork()
if pid == 0:
    code = 1
    try:
        plan.step(rows_batch(3))
    except ForkError as error:
        code = 42 if "forked" in str(error) and "\\n" not in str(error) else 2
    try:  # a team of the child's own works
        own = ops.Team(2)
        build(own, [ir.Norm("n", "x", "y", "w")], slots, {"w": np.ones(8, np.float32)}).step(rows_batch(3))
        own.close()
        team.close()
    except BaseException:
        code = 3
    os._exit(code)
_, status = os.waitpid(pid, 0)
plan.step(rows_batch(3))
team.close()
print(json.dumps([os.waitstatus_to_exitcode(status), "parent ran"]))
"""


FORKED_IN_USE = """
import os, threading
from pace import ops
team = ops.Team(2)
thread = threading.Thread(target=ops.roof_dot, args=(team, "f32"), kwargs={"iterations": 3_000_000})
thread.start()
while thread.is_alive():
    pid = os.fork()
    if pid == 0:
        team.close()
        del team
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        break
thread.join()
team.close()
print(status)
"""
SAME_PID = "int getpid(void) { return 1; }"
OLD_KERNEL = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
int madvise(void *p, size_t bytes, int advice) {  // Linux 4.13: no MADV_WIPEONFORK
    static int (*next)(void *, size_t, int);
    if (advice == 18) return errno = EINVAL, -1;
    if (!next) next = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "madvise");
    return next(p, bytes, advice);
}
"""


@pytest.mark.parametrize("replaced", ["", SAME_PID, OLD_KERNEL], ids=["plain", "same-pid", "old-kernel"])
def test_a_forked_child_gets_an_error(tmp_path: Path, replaced: str) -> None:
    """Also where it has its parent's number, as in a PID namespace of its own, and where only the number tells."""
    preload = preloading(replaced, tmp_path / "preload.so") if replaced else {}
    done = python(FORK, **preload)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [42, "parent ran"]


def test_a_forked_child_lets_go_of_the_team_in_use() -> None:
    """Another thread had its turn when the child was made: closing there neither waits nor ends anything."""
    done = python(FORKED_IN_USE)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_exit_with_a_live_team() -> None:
    """Nobody has to call close()."""
    done = python("from pace import ops; team = ops.Team(3); print(len(ops.isas()) > 0)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")

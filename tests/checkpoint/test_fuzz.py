"""Checkpoints damaged by chance: each loads, or is refused in one line; none ends, hangs or exhausts the process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint import fuzz

# The child itself ends where a load takes 3 s of CPU time; this is for one that waits, on a machine however busy.
LIMIT_S = 120.0
START_S = 600.0  # an editable build may compile first


class Child:
    """A process that answers seeds, started again after one that it did not survive."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = command
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.n_started = 0

    def ask(self, seed: int) -> dict[str, Any]:
        """The child's answer, or what became of it."""
        process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % seed)
        line = self._line(process, LIMIT_S)
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if line is None:
            self.close()
            return {"seed": seed, "bad": f"no answer in {LIMIT_S} s"}
        process.wait()
        return {"seed": seed, "bad": f"the process ended: {self.close()}"}

    def close(self) -> str:
        """End the process; returns its code and the end of what it wrote to stderr."""
        if self.process is None:
            return ""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process = None
        return f"code {code}, {self.folder.joinpath('stderr').read_text('utf-8', 'replace')[-2000:]}"

    def _start(self) -> subprocess.Popen[bytes]:
        self.n_started += 1
        work = self.folder / str(self.n_started)
        work.mkdir(parents=True)
        with (self.folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [*self.command, str(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env={**os.environ, "PACE_THREADS": "1"},
            )
        assert self._line(self.process, START_S) == b"ready\n", self.close()
        return self.process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """One line of its stdout; b"" where the process has ended, None where the time has."""
        assert process.stdout is not None
        fd, data, end = process.stdout.fileno(), b"", time.monotonic() + limit_s
        while not data.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            part = os.read(fd, 1 << 16)
            if not part:
                return b""
            data += part
        return data


def run(
    seeds: Iterable[int], folder: Path, n_children: int, command: list[str]
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Ask `n_children` processes; returns how many loads ended how, and the answers that are none."""
    rest, lock = iter(seeds), threading.Lock()
    counts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []

    def take() -> Iterator[int]:
        while len(bad) < 20:
            with lock:
                seed = next(rest, None)
            if seed is None:
                return
            yield seed

    def work(number: int) -> None:
        child = Child(command, folder / f"child{number}")
        try:
            for seed in take():
                answer = child.ask(seed)
                with lock:
                    counts[answer.get("result", "bad")] += 1
                    if "bad" in answer:
                        bad.append(answer)
        except Exception as error:
            bad.append({"seed": None, "bad": repr(error)})
        finally:
            child.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(n_children)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, bad


FUZZ = [sys.executable, fuzz.__file__]


def check(seeds: range, folder: Path, n_children: int) -> None:
    counts, bad = run(seeds, folder, n_children, FUZZ)
    assert not bad, "\n".join(f"seed {answer['seed']}: {answer['bad']}" for answer in bad)
    assert counts.total() == len(seeds)
    # The damage must be neither too small nor too large to reach what lies behind the first check.
    assert counts["loaded"] > len(seeds) / 25 and counts["refused"] > len(seeds) / 2, counts


def test_damaged_checkpoints(tmp_path: Path) -> None:
    check(range(300), tmp_path, 1)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_checkpoints(tmp_path: Path) -> None:
    check(range(1000, 101_000), tmp_path, min(4, len(os.sched_getaffinity(0))))


def test_damage_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    base = fuzz.checkpoints(tmp_path)
    for seed in range(50):
        first, second = (fuzz.damaged(base, seed, tmp_path / "golden") for _ in range(2))
        assert first == second
        assert first not in base


def test_undamaged_checkpoints_load(tmp_path: Path) -> None:
    for number, files in enumerate(fuzz.checkpoints(tmp_path / "good")):
        fuzz.write(files, tmp_path / str(number))
        assert fuzz.load(tmp_path / str(number)) == "loaded"


FAKE = """
import os, signal, sys, time
print("ready", flush=True)
for line in sys.stdin:
    seed = int(line)
    if seed == 3:
        os.abort()
    if seed == 5:
        time.sleep(60)
    if seed == 6:
        signal.setitimer(signal.ITIMER_PROF, 0.1)
        while True:
            pass
    print('{"seed": %d, "result": "loaded"}' % seed if seed != 7 else '{"seed": 7, "bad": "KeyError"}', flush=True)
"""


def test_a_process_that_dies_or_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LIMIT_S", 2.0)
    counts, bad = run(range(1, 10), tmp_path, 1, [sys.executable, "-I", "-c", FAKE])
    assert counts == {"loaded": 5, "bad": 4}
    assert [answer["seed"] for answer in bad] == [3, 5, 6, 7]
    for answer, word in zip(bad, ("code -6", "no answer", "code -27", "KeyError"), strict=True):
        assert word in answer["bad"]

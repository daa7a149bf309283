"""A step allocates nothing, on any thread: counted by a malloc that the test puts before the C library's."""

from __future__ import annotations

import json
from pathlib import Path

from ext.kit import python
from ext.preload import preloading

COUNTER = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
static atomic_long count;
long allocations(void) { return count; }
void *malloc(size_t n) { count++; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count++; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count++; return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { count++; return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { count++; return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { count++; return (*p = __libc_memalign(a, n)) ? 0 : ENOMEM; }
void *mmap(void *p, size_t n, int prot, int flags, int fd, long at) {
    count++;
    return (void *)syscall(SYS_mmap, p, n, prot, flags, fd, at);
}
"""

STEPS = """
import ctypes, json, sys, tempfile
from pathlib import Path
import numpy as np
from ext.kit import pack_model
from golden import tiny
from golden.harness import batch_of, load
from pace import ops

count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_long
team = ops.Team(3)
name = "llama-gqa4-tied"
model = pack_model(team, load(tiny.write(name, Path(tempfile.mkdtemp())), tiny.CASES[name].max_model_len))
runner = model.runner(team, n_blocks=512, max_tokens=2048, max_seqs=128)


def fewest(parts):
    # Of several steps: the interpreter itself may take memory in one of them.
    batch = batch_of(parts, range(len(parts)))
    args = batch.token_ids, batch.q_start, batch.kv_len, batch.tables, batch.logit_rows
    counts = []
    for _ in range(8):
        before = count()
        runner._plan.step(*args)
        counts.append(count() - before)
    return min(counts)


print(json.dumps({
    "one": fewest([([1], 3, [0])]),
    "long, split among threads": fewest([([1], 511, [*range(32)])]),
    "128 sequences": fewest([([1], 5, [i]) for i in range(128)]),
    "100 tiles of prompts": fewest([([1] * 400, 0, [*range(25 * i, 25 * i + 25)]) for i in range(4)]),
    "counts": count() > 1000,
}))
"""


def test_a_step_allocates_nothing(tmp_path: Path) -> None:
    """From one row to more attention tiles than a sort of the C library takes without memory (86)."""
    done = python(STEPS, **preloading(COUNTER, tmp_path / "count.so"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts.pop("counts"), "or the counter does nothing"
    assert set(counts.values()) == {0}, counts

# The only Cython module of pace: check, one call without the GIL, return. No arithmetic lives here.
# bf16 arrays cross as uint16. pace/ops/ is the only importer and carries the documentation of every name.
from libc.errno cimport E2BIG, EDOM, EFAULT, ENOMEM
from libc.limits cimport INT_MAX
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.mem cimport PyMem_Free, PyMem_Malloc

import time

import numpy as np


cdef extern from "cpu.h" nogil:
    struct pace_cpu_info:
        char vendor[13]
        char brand[49]
        int family, model, stepping
        size_t l1d_bytes, l2_bytes, l3_bytes
    bint pace_cpu_runs(int tier)
    bint pace_cpu_has(int feature)
    const char *pace_cpu_feature_name(int i)
    const char *pace_tier_name(int i)
    const char *pace_tier_missing(int tier)
    void pace_cpu_identify(pace_cpu_info *info)


cdef extern from "threads.h" nogil:
    ctypedef struct pace_team:
        pass
    int PACE_E_FORKED, PACE_E_BUSY, PACE_E_CLOSED, PACE_MAX_THREADS
    pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes)
    int pace_team_close(pace_team *team)
    void pace_team_free(pace_team *team)
    bint pace_team_is_closed(const pace_team *team)
    ctypedef void (*pace_team_fn)(void *arg, int tid, pace_team *team) noexcept nogil
    int pace_team_run(pace_team *team, pace_team_fn fn, void *arg)
    int pace_team_run_with(pace_team *team, pace_team_fn fn, void *arg, size_t scratch_bytes)
    void *pace_team_scratch(const pace_team *team, int tid)


cdef extern from "work.h" nogil:
    ctypedef struct pace_work:
        pass
    int pace_work_init(pace_work *work, int n_threads)
    void pace_work_destroy(pace_work *work)
    void pace_work_arm_all(pace_work *work, long n_items)
    bint pace_work_next(pace_work *work, int tid, long grain, long *begin, long *end)


cdef extern from "machine.h" nogil:
    int pace_default_threads(char *why, size_t why_bytes)
    int pace_default_cpus(int *cpus, int max_cpus)
    int pace_numa_nodes()
    void pace_thp_mode(char *mode, size_t mode_bytes)


cdef extern from "pages.h" nogil:
    void *pace_alloc_huge(size_t bytes)
    void pace_free_huge(void *p, size_t bytes)


cdef extern from "kernels.h" nogil:
    ctypedef uint16_t bf16
    const char *PACE_LAYOUTS
    int PACE_NR, PACE_LOGIT_BLOCK
    int PACE_MAX_HEAD_DIM, PACE_MAX_GROUPS, PACE_BF16_ROWS, PACE_PANELS, PACE_MXFP4, PACE_INT8, PACE_INT4, PACE_FP8
    int PACE_MX_GROUP, PACE_KPAD, PACE_SCALES_BF16
    ctypedef struct pace_matrix:
        const void *data
        long n, k, k_pad, n_panels
        int layout, scales, zeros
        long group, count, stride
    pace_matrix pace_matrix_at(const pace_matrix *w, long i)
    ctypedef struct pace_slot:
        void *data
        long ld, width
        int bf16, int8
        long group
    struct pace_table:
        const int32_t *blocks
        long stride
    ctypedef struct pace_batch:
        const int32_t *token_ids
        const int32_t *q_start
        const int32_t *kv_len
        const int32_t *logit_rows
        pace_table *tables
        long n_tokens, n_seqs, n_logits
    ctypedef struct pace_kv:
        long block, n_kv_heads, head_dim
        int int8, contiguous, group
    ctypedef struct pace_rotation:
        const float *cos
        const float *sin
        long ld, half
        int interleaved
    ctypedef struct pace_gemm:
        pace_slot dst
    ctypedef struct pace_roofline:
        double (*read)(const void *p, size_t bytes) noexcept nogil
        double (*dot_bf16)(long iters) noexcept nogil
        double (*dot_s8)(long iters) noexcept nogil
        double (*fma_f32)(long iters) noexcept nogil
    ctypedef struct pace_kernels:
        const char *isa
        pace_roofline roof
        int gemm_rows
        int row_step
        void (*quantise_rows)(unsigned char *codes, void *scales, float *row, const pace_matrix *w, const void *src, int dtype,
                              long ld, long rows) noexcept nogil
        void (*unpack_row)(float *dst, const pace_matrix *w, long row) noexcept nogil
        void (*softmax)(float *x, long n) noexcept nogil
        long (*argmax)(const float *x, long n) noexcept nogil
        void (*block_max)(const float *x, long n, float *max) noexcept nogil
    const pace_kernels *pace_find_tier(const char *isa)


# ---- the kernel table ------------------------------------------------------------------------------------------

cdef const pace_kernels *current = NULL


cdef const pace_kernels *find(tier) except NULL:
    if tier is None:
        return current
    cdef bytes name = tier.encode()
    cdef const pace_kernels *k = pace_find_tier(name)
    if k == NULL:
        raise ValueError(f"ISA tier {tier!r} is unknown or does not run here; runnable: {', '.join(runnable())}")
    return k


def tiers():
    """Every compiled tier, best first, with the CPU feature it misses here (None: it runs)."""
    out = []
    cdef int i = 0
    while pace_tier_name(i) != NULL:
        name = pace_tier_name(i).decode()
        missing = pace_tier_missing(i)
        if missing != NULL:
            out.append((name, missing.decode()))
        else:
            out.append((name, None if pace_find_tier(name.encode()) != NULL else "operating system support"))
        i += 1
    return out


def runnable():
    return [name for name, missing in tiers() if missing is None]


def use_isa(tier):
    global current
    if tier not in runnable():
        raise ValueError(f"ISA tier {tier!r} is unknown or does not run here; runnable: {', '.join(runnable())}")
    current = find(tier)


def isa():
    return current.isa.decode() if current != NULL else None


def cpu():
    cdef pace_cpu_info info
    cdef char text[256]
    cdef int cpus[1024]
    pace_cpu_identify(&info)
    features = []
    cdef int i = 0
    while pace_cpu_feature_name(i) != NULL:
        if pace_cpu_has(i):
            features.append(pace_cpu_feature_name(i).decode())
        i += 1
    threads = pace_default_threads(text, sizeof(text))
    why = text.decode()
    n = pace_default_cpus(cpus, 1024)
    default_cpus = [cpus[i] for i in range(min(n, 1024))]
    pace_thp_mode(text, sizeof(text))
    return {
        "vendor": info.vendor.decode(), "brand": info.brand.decode(), "family": info.family, "model": info.model,
        "l1d_bytes": info.l1d_bytes, "l2_bytes": info.l2_bytes, "l3_bytes": info.l3_bytes, "features": features,
        "threads": threads, "threads_why": why, "cpus": default_cpus, "numa_nodes": pace_numa_nodes(),
        "huge_pages": text.decode(),
    }


def softmax(float[::1] x):
    if x.shape[0]:
        with nogil:
            current.softmax(&x[0], x.shape[0])


def argmax(const float[::1] x):
    if not x.shape[0]:
        return -1
    return current.argmax(&x[0], x.shape[0])


include "team.pxi"
include "sampling.pxi"
include "memory.pxi"
include "plan.pxi"
include "suffix.pxi"

# The only Cython module of pace: check, one call without the GIL, return. No arithmetic lives here.
# bf16 arrays cross as uint16. ops.py is the only importer and carries the documentation of every name.
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
    int PACE_E_FORKED, PACE_E_BUSY, PACE_MAX_THREADS
    pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes)
    void pace_team_free(pace_team *team)
    int pace_team_size(const pace_team *team)
    int pace_default_threads(char *why, size_t why_bytes)
    int pace_default_cpus(int *cpus, int max_cpus)
    int pace_allowed_cpus(int *cpus, int max_cpus)
    double pace_cgroup_cpus(const char *root)
    ctypedef void (*pace_team_fn)(void *arg, int tid, pace_team *team) noexcept nogil
    int pace_team_run(pace_team *team, pace_team_fn fn, void *arg)
    ctypedef struct pace_work:
        pass
    int pace_work_init(pace_work *work, int n_threads)
    void pace_work_destroy(pace_work *work)
    void pace_work_arm_all(pace_work *work, long n_items)
    bint pace_work_next(pace_work *work, int tid, long grain, long *begin, long *end)
    int pace_numa_nodes()
    void pace_thp_mode(char *mode, size_t mode_bytes)
    void *pace_alloc_huge(size_t bytes)
    void pace_free_huge(void *p, size_t bytes)


cdef extern from "kernels.h" nogil:
    ctypedef uint16_t bf16
    int PACE_NR, PACE_LOGIT_BLOCK
    ctypedef struct pace_gemm:
        const bf16 *a
        const bf16 *w
        const float *bias
        void *c
        long lda, ldc, m, n, k
        float scale
        int epilogue, act, c_bf16
    ctypedef struct pace_norm:
        const float *x
        void *y
        const float *weight
        const float *bias
        long ldx, ldy, m, n
        float eps
        int kind, y_bf16, add
    ctypedef struct pace_kv:
        long block, n_heads, n_kv_heads, head_dim
        int int8, contiguous
    ctypedef struct pace_rope_kv:
        const float *qkv
        bf16 *q
        long ldx, ldq
        const float *cos
        const float *sin
        long rotary_dim
        int interleaved
        const float *q_norm
        const float *k_norm
        int norm_kind
        float norm_eps
        pace_kv kv
    ctypedef struct pace_attention:
        const bf16 *q
        bf16 *out
        long ldq, ldo
        float scale, softcap
        long window
        const float *sinks
        pace_kv kv
    ctypedef struct pace_roofline:
        double (*read)(const void *p, size_t bytes) noexcept nogil
        double (*dot_bf16)(long iters) noexcept nogil
        double (*dot_s8)(long iters) noexcept nogil
        double (*fma_f32)(long iters) noexcept nogil
    ctypedef struct pace_kernels:
        const char *isa
        pace_roofline roof
        int gemm_rows
        void (*unpack_row)(float *dst, const bf16 *w, long row, long k, long k_pad) noexcept nogil
        void (*softmax)(float *x, long n) noexcept nogil
        long (*argmax)(const float *x, long n) noexcept nogil
        void (*block_max)(const float *x, long n, float *max) noexcept nogil
    const pace_kernels *pace_find_tier(const char *isa)


cdef extern from "plan.h" nogil:
    ctypedef struct pace_matrix:
        bf16 *data
        size_t bytes
        long n, k, k_pad, n_panels
    int pace_matrix_init(pace_matrix *w, long n, long k)
    void pace_matrix_free(pace_matrix *w)
    int pace_matrix_pack(pace_matrix *w, pace_team *team, const pace_kernels *kernels, const void *src, int dtype,
                         long ld, long rows, long at, int mode)
    ctypedef struct pace_pool:
        size_t bytes
    int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape)
    void pace_pool_free(pace_pool *pool)
    pace_kv pace_pool_layer(const pace_pool *pool, long layer)
    void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens)
    int PACE_EMBED, PACE_NORM, PACE_GEMM, PACE_ANGLES, PACE_ROPE_KV, PACE_ATTENTION, PACE_SELECT
    struct embed_op:
        const pace_matrix *table
        float *x
        long ldx
        float scale
    struct gemm_op:
        pace_gemm g
        long n_panels
        float *block_max
    struct angles_op:
        const float *inv_freq
        float *cos
        float *sin
        long half
        float factor
    struct select_op:
        const char *src
        char *dst
        size_t row_bytes, src_stride, dst_stride
    union op_union:
        embed_op embed
        pace_norm norm
        gemm_op gemm
        angles_op angles
        pace_rope_kv rope
        pace_attention attention
        select_op select
    ctypedef struct pace_op:
        int kind, logits
        const pace_kernels *kernels
        op_union u
    ctypedef struct pace_batch:
        const int32_t *token_ids
        const int32_t *q_start
        const int32_t *kv_len
        const int32_t *block_tables
        const int32_t *logit_rows
        long n_tokens, n_seqs, n_logits, table_stride
    ctypedef struct pace_plan:
        pace_op *ops
        pace_team *team
        long n_ops, max_tokens, max_seqs, max_logits
        double *op_s
    int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits, long n_heads,
                       long n_kv_heads, long head_dim)
    void pace_plan_free(pace_plan *p)
    pace_op *pace_plan_add(pace_plan *p, int kind, const pace_kernels *kernels)
    int pace_plan_step(pace_plan *p, const pace_batch *batch)


cdef extern from "sampler.h" nogil:
    struct pace_sample_params:
        float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
        int32_t top_k, n_logprobs
        uint64_t seed, position
        uint32_t sample_index
        int32_t n_prompt, n_output, n_banned, n_bias, n_allowed
        const int32_t *prompt
        const int32_t *output
        const int32_t *banned
        const int32_t *bias_ids
        const float *bias
        const int32_t *allowed
    struct pace_sample_result:
        int32_t token, rank
        float logprob
        int32_t *top_ids
        float *top_logprobs
    size_t pace_sample_scratch(int vocab)
    int pace_sample_row(const pace_kernels *kernels, const float *logits, const float *block_max, int vocab,
                        const pace_sample_params *params, pace_sample_result *result, void *scratch)
    int pace_logprobs_row(const pace_kernels *kernels, const float *logits, int vocab, int32_t token, int n_logprobs,
                          pace_sample_result *result, void *scratch)


cdef packed struct sample_record:  # ops.SAMPLE_DTYPE
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
    int32_t top_k, n_logprobs
    uint64_t seed, position
    uint32_t sample_index


cdef struct sample_job:
    const pace_kernels *kernels
    const float *logits
    const float *block_max  # [rows][blocks], or NULL
    long stride, n_blocks
    int vocab, n_logprobs
    const int32_t *given  # tokens to score; NULL: draw them
    const pace_sample_params *params
    pace_sample_result *results
    int32_t *errors
    char *scratch
    size_t scratch_stride
    pace_work work


cdef void sample_worker(void *arg, int tid, pace_team *team) noexcept nogil:
    cdef sample_job *j = <sample_job *>arg
    cdef long i = 0, end = 0
    cdef void *scratch = j.scratch + tid * j.scratch_stride
    while pace_work_next(&j.work, tid, 1, &i, &end):
        if j.given != NULL:
            j.errors[i] = pace_logprobs_row(j.kernels, j.logits + i * j.stride, j.vocab, j.given[i], j.n_logprobs,
                                            &j.results[i], scratch)
        else:
            j.errors[i] = pace_sample_row(j.kernels, j.logits + i * j.stride,
                                          j.block_max + i * j.n_blocks if j.block_max != NULL else NULL, j.vocab,
                                          &j.params[i], &j.results[i], scratch)


cdef int32_t point(const int32_t[::1] ids, const int32_t **start) except -1:
    """Its length; start: its first element, NULL where there is none."""
    start[0] = &ids[0] if ids.shape[0] else NULL
    return <int32_t>ids.shape[0]


cdef struct roof_job:
    double (*dot)(long iters) noexcept nogil
    double (*read)(const void *p, size_t bytes) noexcept nogil
    const char *data
    size_t bytes
    long repeat
    int n_threads
    double done[1024]


cdef void roof_worker(void *arg, int tid, pace_team *team) noexcept nogil:
    cdef roof_job *j = <roof_job *>arg
    cdef size_t share = j.bytes / <size_t>j.n_threads / 512 * 512
    cdef long i
    j.done[tid] = 0
    if j.dot != NULL:
        j.done[tid] = j.dot(j.repeat)
    else:
        for i in range(j.repeat):
            j.done[tid] += j.read(j.data + tid * share, share)


cdef class Memory:
    """Zeroed memory, from huge pages where the system grants them."""
    cdef void *data
    cdef readonly size_t nbytes

    def __cinit__(self, size_t nbytes):
        self.nbytes = nbytes
        self.data = pace_alloc_huge(nbytes)
        if self.data == NULL:
            raise MemoryError(f"cannot allocate {nbytes} bytes")

    def __dealloc__(self):
        pace_free_huge(self.data, self.nbytes)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.nbytes, 0, flags)


class Forked(RuntimeError):
    pass


cdef int check_run(int e) except -1:
    if e == 0:
        return 0
    if e == PACE_E_FORKED:
        raise Forked("this process was forked from one that built the engine; its threads do not exist here: "
                     "build the engine in the child, or start it with the spawn method")
    if e == PACE_E_BUSY:
        raise RuntimeError("the thread team was entered again from inside its own step")
    raise OSError(e, "the thread team could not run")


cdef class Team:
    cdef pace_team *team
    cdef readonly int n_threads
    cdef Memory scratch  # the sampler's, grown to the largest vocabulary seen

    def __cinit__(self, int n_threads, cpus=None):
        cdef char err[256]
        cdef int *list_ = NULL
        if not 1 <= n_threads <= PACE_MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}, expected 1 to {PACE_MAX_THREADS}")
        if cpus is not None:
            if len(cpus) != n_threads:
                raise ValueError(f"{len(cpus)} cpus for {n_threads} threads")
            list_ = <int *>PyMem_Malloc(n_threads * sizeof(int))
            for i in range(n_threads):
                list_[i] = cpus[i]
        err[0] = 0
        self.team = pace_team_new(n_threads, list_, err, sizeof(err))
        PyMem_Free(list_)
        if self.team == NULL:
            raise OSError(err.decode())
        self.n_threads = n_threads

    cdef double roof(self, roof_job *job) except -1:
        """Operations or bytes per second of one run."""
        cdef int e
        if self.team == NULL:
            raise RuntimeError("the thread team is closed")
        job.n_threads = self.n_threads
        start = time.perf_counter()
        with nogil:
            e = pace_team_run(self.team, roof_worker, <void *>job)
        elapsed = time.perf_counter() - start
        check_run(e)
        return sum([job.done[i] for i in range(self.n_threads)]) / elapsed

    def roof_read(self, Memory memory, long repeat):
        cdef roof_job job
        memset(&job, 0, sizeof(job))
        job.read, job.data, job.bytes, job.repeat = current.roof.read, <const char *>memory.data, memory.nbytes, repeat
        return self.roof(&job)

    def roof_dot(self, kind, tier, long iterations):
        cdef roof_job job
        cdef const pace_kernels *k = find(tier)
        memset(&job, 0, sizeof(job))
        if kind not in ("bf16", "int8", "f32"):
            raise ValueError(f"dot-product roof of {kind!r}, expected bf16, int8 or f32")
        job.dot = k.roof.dot_bf16 if kind == "bf16" else k.roof.dot_s8 if kind == "int8" else k.roof.fma_f32
        job.repeat = iterations
        return self.roof(&job)

    cdef int run_rows(self, sample_job *job, const float[:, :] logits, int32_t[:, ::1] top_ids,
                      float[:, ::1] top_logprobs, int32_t[::1] errors) except -1:
        """Draw or score every row; job.params or job.given, and room for the results, are the caller's."""
        cdef long i, n = logits.shape[0]
        cdef int e
        if logits.shape[1] > 1 and logits.strides[1] != 4:
            raise ValueError("the columns of the logits are not side by side")
        job.kernels = current
        job.logits, job.stride = &logits[0, 0], logits.strides[0] // 4
        job.scratch_stride = (pace_sample_scratch(job.vocab) + 63) // 64 * 64
        if self.scratch is None or self.scratch.nbytes < job.scratch_stride * self.n_threads:
            self.scratch = Memory(job.scratch_stride * self.n_threads)
        job.scratch = <char *>self.scratch.data
        job.errors = &errors[0]
        for i in range(n):
            job.results[i].top_ids, job.results[i].top_logprobs = &top_ids[i, 0], &top_logprobs[i, 0]
        if pace_work_init(&job.work, self.n_threads):
            raise MemoryError("cannot allocate the sampling batch")
        pace_work_arm_all(&job.work, n)
        with nogil:
            e = pace_team_run(self.team, sample_worker, <void *>job)
        pace_work_destroy(&job.work)
        return check_run(e)

    def most_logprobs(self, const sample_record[::1] params):
        """Columns of the results: the largest n_logprobs, at least 1. (numpy's max costs 20 us after a step has emptied
        the caches of the interpreter.)"""
        cdef long i
        cdef int32_t most = 1
        for i in range(params.shape[0]):
            most = max(most, params[i].n_logprobs)
        return most

    def sample(self, const float[:, :] logits, maxima, const sample_record[::1] params, history, int32_t[::1] tokens,
               float[::1] logprobs, int32_t[::1] ranks, int32_t[:, ::1] top_ids, float[:, ::1] top_logprobs,
               int32_t[::1] errors):
        cdef long i, n = logits.shape[0]
        cdef const float[::1] bias
        cdef const float[:, ::1] block_max
        cdef pace_sample_params *p
        cdef sample_job job
        if self.team == NULL:
            raise RuntimeError("the thread team is closed")
        if not n:
            return
        if params.shape[0] != n or len(history) != n or tokens.shape[0] != n or errors.shape[0] != n:
            raise ValueError(f"{n} rows of logits, {params.shape[0]} of parameters, {len(history)} of history")
        memset(&job, 0, sizeof(job))
        job.vocab, job.n_blocks = <int>logits.shape[1], (logits.shape[1] + PACE_LOGIT_BLOCK - 1) // PACE_LOGIT_BLOCK
        if maxima is not None:
            block_max = maxima
            if block_max.shape[0] != n or block_max.shape[1] != job.n_blocks:
                raise ValueError(f"maxima are {maxima.shape}, expected ({n}, {job.n_blocks})")
            job.block_max = &block_max[0, 0]
        job.params = p = <pace_sample_params *>PyMem_Malloc(n * sizeof(pace_sample_params))
        job.results = <pace_sample_result *>PyMem_Malloc(n * sizeof(pace_sample_result))
        held = []  # the arrays that p points to, whatever another thread does to `history` meanwhile
        try:
            if job.params == NULL or job.results == NULL:
                raise MemoryError("cannot allocate the sampling batch")
            memset(p, 0, n * sizeof(pace_sample_params))
            for i in range(n):
                p[i].temperature, p[i].top_p, p[i].min_p = params[i].temperature, params[i].top_p, params[i].min_p
                p[i].repetition_penalty = params[i].repetition_penalty
                p[i].presence_penalty = params[i].presence_penalty
                p[i].frequency_penalty = params[i].frequency_penalty
                p[i].top_k, p[i].n_logprobs = params[i].top_k, params[i].n_logprobs
                p[i].seed, p[i].position = params[i].seed, params[i].position
                p[i].sample_index = params[i].sample_index
                if p[i].n_logprobs > top_ids.shape[1] or p[i].n_logprobs > job.vocab:
                    raise ValueError(f"row {i} asks for {p[i].n_logprobs} logprobs, there is room for {top_ids.shape[1]}")
                row = history[i]
                if row is None:
                    continue
                row = tuple(row)
                held.append(row)
                prompt, output, banned, bias_ids, values, allowed = row
                p[i].n_prompt = point(prompt, &p[i].prompt)
                p[i].n_output = point(output, &p[i].output)
                p[i].n_banned = point(banned, &p[i].banned)
                p[i].n_bias = point(bias_ids, &p[i].bias_ids)
                p[i].n_allowed = point(allowed, &p[i].allowed)
                bias = values
                if bias.shape[0] != p[i].n_bias:
                    raise ValueError(f"row {i} has {bias.shape[0]} biases for {p[i].n_bias} ids")
                p[i].bias = &bias[0] if bias.shape[0] else NULL
            self.run_rows(&job, logits, top_ids, top_logprobs, errors)
            for i in range(n):
                tokens[i], logprobs[i], ranks[i] = job.results[i].token, job.results[i].logprob, job.results[i].rank
        finally:
            PyMem_Free(<void *>job.params)
            PyMem_Free(job.results)

    def logprobs(self, const float[:, :] logits, const int32_t[::1] tokens, int n_logprobs, float[::1] logprobs,
                 int32_t[::1] ranks, int32_t[:, ::1] top_ids, float[:, ::1] top_logprobs, int32_t[::1] errors):
        cdef long i, n = logits.shape[0]
        cdef sample_job job
        if self.team == NULL:
            raise RuntimeError("the thread team is closed")
        if tokens.shape[0] != n:
            raise ValueError(f"{n} rows of logits, {tokens.shape[0]} tokens")
        if not n:
            return
        memset(&job, 0, sizeof(job))
        job.vocab, job.n_logprobs, job.given = <int>logits.shape[1], n_logprobs, &tokens[0]
        if not 0 <= n_logprobs <= min(job.vocab, top_ids.shape[1]):
            raise ValueError(f"{n_logprobs} logprobs of a vocabulary of {job.vocab}")
        for i in range(n):
            if not 0 <= tokens[i] < job.vocab:
                raise ValueError(f"token id {tokens[i]} at row {i}, the logits have {job.vocab} columns")
        job.results = <pace_sample_result *>PyMem_Malloc(n * sizeof(pace_sample_result))
        try:
            if job.results == NULL:
                raise MemoryError("cannot allocate the sampling batch")
            self.run_rows(&job, logits, top_ids, top_logprobs, errors)
            for i in range(n):
                if not errors[i]:
                    logprobs[i], ranks[i] = job.results[i].logprob, job.results[i].rank
        finally:
            PyMem_Free(job.results)

    def close(self):
        if self.team != NULL:
            pace_team_free(self.team)
            self.team = NULL

    def __dealloc__(self):
        if self.team != NULL:
            pace_team_free(self.team)


cdef class Matrix:
    cdef pace_matrix w
    cdef readonly long n, k

    def __cinit__(self, long n, long k):
        if n < 1 or k < 1:
            raise ValueError(f"matrix is [{n}, {k}], both must be positive")
        if pace_matrix_init(&self.w, n, k):
            raise MemoryError(f"cannot allocate a packed matrix [{n}, {k}]")
        self.n, self.k = n, k

    def __dealloc__(self):
        pace_matrix_free(&self.w)

    @property
    def nbytes(self):
        return self.w.bytes

    def pack(self, Team team, const unsigned char[:, ::1] src, int dtype, long at, int mode):
        cdef long rows = src.shape[0], k = self.k, most
        if dtype not in (0, 1, 2) or mode not in (0, 1, 2) or rows < 1 or src.shape[1] != k * (4 if dtype == 2 else 2):
            raise ValueError(f"source rows have {src.shape[1]} bytes, the matrix wants {k} elements of type {dtype}")
        most = at + (rows if mode == 0 else (rows + 15) // 16 * 32 - 16 * (mode == 1))
        if at < 0 or at % 16 or most > self.w.n_panels * PACE_NR:
            raise ValueError(f"{rows} rows at {at} do not fit a packed matrix of {self.n} rows")
        cdef const void *p = &src[0, 0]
        cdef int e
        if team.team == NULL:
            raise RuntimeError("the thread team is closed")
        with nogil:
            e = pace_matrix_pack(&self.w, team.team, current, p, dtype, k, rows, at, mode)
        check_run(e)

    def unpack(self):
        out = np.empty((self.n, self.k), np.float32)
        cdef float[:, ::1] o = out
        cdef long i
        with nogil:
            for i in range(self.n):
                current.unpack_row(&o[i, 0], self.w.data, i, self.k, self.w.k_pad)
        return out


cdef class KVPool:
    cdef pace_pool pool
    cdef readonly long n_layers, n_kv_heads, head_dim, n_blocks, block_size
    cdef readonly bint contiguous

    def __cinit__(self, long n_layers, long n_kv_heads, long head_dim, long n_blocks, long block_size, bint int8,
                  bint contiguous):
        cdef pace_kv shape
        if min(n_layers, n_kv_heads, n_blocks) < 1:
            raise ValueError(f"KV pool of {n_layers} layers, {n_kv_heads} heads, {n_blocks} blocks: all must be positive")
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}, expected a multiple of 16 up to 256")
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size is {block_size}, expected a power of two from 16 on")
        self.n_layers, self.n_kv_heads, self.head_dim = n_layers, n_kv_heads, head_dim
        self.n_blocks, self.block_size, self.contiguous = n_blocks, block_size, contiguous
        memset(&shape, 0, sizeof(shape))
        shape.block, shape.n_kv_heads, shape.head_dim = block_size, n_kv_heads, head_dim
        shape.int8, shape.contiguous = int8, contiguous
        if pace_pool_init(&self.pool, n_layers, n_blocks, &shape):
            raise MemoryError(f"cannot allocate a KV pool of {n_blocks} blocks of {block_size} tokens")

    def __dealloc__(self):
        pace_pool_free(&self.pool)

    @property
    def nbytes(self):
        return self.pool.bytes

    def copy(self, long src, long dst, long n_tokens):
        if not 0 <= src < self.n_blocks or not 0 <= dst < self.n_blocks or src == dst:
            raise ValueError(f"copy of block {src} to {dst}: expected two different blocks of {self.n_blocks}")
        if not 0 <= n_tokens <= self.block_size:
            raise ValueError(f"copy of {n_tokens} tokens, expected 0 to {self.block_size}, the size of a block")
        with nogil:
            pace_pool_copy(&self.pool, src, dst, n_tokens)


cdef struct slot:
    char *data
    long width, ld
    int is_bf16, logits


cdef class Plan:
    """Slots and operators are added by index in order, then step() runs them."""
    cdef pace_plan p
    cdef slot slots[64]
    cdef int n_slots
    cdef list keep, memory
    cdef Team team
    cdef KVPool pool
    cdef readonly long vocab_size, max_blocks
    cdef readonly size_t nbytes
    cdef long n_heads

    def __cinit__(self, Team team, KVPool pool, long max_tokens, long max_seqs, long max_logits, long n_heads,
                  long vocab_size):
        if min(max_tokens, max_seqs, max_logits, n_heads, vocab_size) < 1:
            raise ValueError("plan sizes must be positive")
        self.keep = [team, pool]
        self.memory = []
        self.team, self.pool = team, pool
        self.vocab_size, self.n_heads = vocab_size, n_heads
        if pace_plan_init(&self.p, team.team, max_tokens, max_seqs, max_logits, n_heads, pool.n_kv_heads,
                          pool.head_dim):
            raise MemoryError("cannot allocate the plan")

    def __dealloc__(self):
        pace_plan_free(&self.p)

    cdef pace_op *add(self, int kind, tier) except NULL:
        cdef const pace_kernels *kernels = find(tier)
        cdef pace_op *op = pace_plan_add(&self.p, kind, kernels)
        if op == NULL:
            raise MemoryError("cannot allocate the plan")
        return op

    cdef const float *vector(self, v, long n) except? NULL:
        """Address of an f32 vector that the plan keeps alive; NULL for None."""
        if v is None:
            return NULL
        v = np.asarray(v, np.float32)
        if v.shape != (n,):
            raise ValueError(f"vector is {v.shape}, expected ({n},)")
        padded = np.zeros(n + 32, np.float32)  # a bias is read in whole panels
        padded[:n] = v
        self.keep.append(padded)
        cdef float[::1] a = padded
        return &a[0]

    cdef slot *at(self, int i) except NULL:
        if not 0 <= i < self.n_slots:
            raise ValueError(f"slot {i} of {self.n_slots}")
        return &self.slots[i]

    def add_slot(self, long width, bint is_bf16, bint logits):
        if self.n_slots == 64:
            raise ValueError("more than 64 slots")
        cdef slot *s = &self.slots[self.n_slots]
        # 64 extra bytes a row: rows of a register tile then fall into different cache sets.
        s.ld = (width + 31) // 32 * 32 + 32 if is_bf16 else (width + 15) // 16 * 16
        s.width, s.is_bf16, s.logits = width, is_bf16, logits
        rows = self.p.max_logits if logits else self.p.max_tokens
        memory = Memory(<size_t>rows * s.ld * (2 if is_bf16 else 4) + 64)
        s.data = <char *>(<Memory>memory).data
        self.memory.append(memory)
        self.nbytes += memory.nbytes
        self.n_slots += 1
        return self.n_slots - 1

    def add_embed(self, tier, int dst, Matrix table, float scale):
        cdef slot *d = self.at(dst)
        cdef pace_op *op = self.add(PACE_EMBED, tier)
        if d.is_bf16 or d.width != table.k or table.n < self.vocab_size:
            raise ValueError(f"embedding table [{table.n}, {table.k}] does not hold {self.vocab_size} tokens of width {d.width}")
        self.keep.append(table)
        op.logits = d.logits
        op.u.embed.table, op.u.embed.x = &table.w, <float *>d.data
        op.u.embed.ldx, op.u.embed.scale = d.ld, scale

    def add_norm(self, tier, int src, int dst, weight, bias, int kind, float eps, bint accumulate):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        if s.is_bf16 or s.width != d.width or s.logits != d.logits or (accumulate and d.is_bf16):
            raise ValueError("norm wants an f32 source, a destination of the same shape, and f32 to accumulate")
        cdef pace_op *op = self.add(PACE_NORM, tier)
        op.logits = s.logits
        op.u.norm.x = <const float *>s.data
        op.u.norm.y = d.data
        op.u.norm.weight = self.vector(weight, s.width)
        op.u.norm.bias = self.vector(bias, s.width)
        op.u.norm.ldx, op.u.norm.ldy, op.u.norm.n = s.ld, d.ld, s.width
        op.u.norm.eps, op.u.norm.kind = eps, kind
        op.u.norm.y_bf16, op.u.norm.add = d.is_bf16, accumulate

    def add_gemm(self, tier, int src, int dst, Matrix w, bias, int epilogue, int act, float scale):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long n = (2 if epilogue == 2 else 1) * d.width
        if not s.is_bf16 or s.width != w.k or s.logits != d.logits or w.n != n:
            raise ValueError(f"matrix [{w.n}, {w.k}] does not take a slot of width {s.width} to one of {d.width}")
        if (epilogue == 1 and d.is_bf16) or (epilogue == 2 and not d.is_bf16):
            raise ValueError("the add epilogue wants an f32 slot, the gated one a bf16 slot")
        cdef pace_op *op = self.add(PACE_GEMM, tier)
        op.logits = s.logits
        self.keep.append(w)
        op.u.gemm.n_panels = w.w.n_panels
        op.u.gemm.g.a = <const bf16 *>s.data
        op.u.gemm.g.w = w.w.data
        op.u.gemm.g.bias = self.vector(bias, w.n)
        op.u.gemm.g.c = d.data
        op.u.gemm.g.lda, op.u.gemm.g.ldc = s.ld, d.ld
        op.u.gemm.g.n, op.u.gemm.g.k = d.width, w.w.k_pad
        op.u.gemm.g.scale, op.u.gemm.g.epilogue, op.u.gemm.g.act = scale, epilogue, act
        op.u.gemm.g.c_bf16 = d.is_bf16

    def note_maxima(self, int logits):
        """Let the last operator, a GEMM to this slot, note the maxima of the blocks of its rows: f32 [rows, blocks].

        None where it is no such GEMM, or its kernels note none."""
        cdef slot *d = self.at(logits)
        cdef pace_op *op = &self.p.ops[self.p.n_ops - 1] if self.p.n_ops else NULL
        if (op == NULL or op.kind != PACE_GEMM or op.u.gemm.g.c != <void *>d.data or d.is_bf16
                or op.kernels.block_max == NULL):
            return None
        rows = self.p.max_logits if d.logits else self.p.max_tokens
        maxima = np.zeros((rows, (d.width + PACE_LOGIT_BLOCK - 1) // PACE_LOGIT_BLOCK), np.float32)
        cdef float[:, ::1] a = maxima
        self.keep.append(maxima)
        op.u.gemm.block_max = &a[0, 0]
        return maxima

    def add_angles(self, tier, inv_freq, int cos, int sin, float factor):
        cdef pace_op *op = self.add(PACE_ANGLES, tier)
        cdef slot *c = self.at(cos)
        cdef slot *s = self.at(sin)
        half = len(inv_freq)
        if c.width != half or s.width != half or c.is_bf16 or s.is_bf16:
            raise ValueError(f"angle slots must be f32 and {half} wide")
        op.u.angles.inv_freq = self.vector(inv_freq, half)
        op.u.angles.cos, op.u.angles.sin = <float *>c.data, <float *>s.data
        op.u.angles.half, op.u.angles.factor = half, factor

    cdef pace_kv kv(self, long layer) except *:
        if not 0 <= layer < self.pool.n_layers:
            raise ValueError(f"layer {layer} of {self.pool.n_layers}")
        cdef pace_kv kv = pace_pool_layer(&self.pool.pool, layer)
        kv.n_heads = self.n_heads
        return kv

    def add_rope_kv(self, tier, int src, int dst, long layer, int cos, int sin, long rotary_dim, bint interleaved,
                    q_norm, k_norm, int norm_kind, float norm_eps):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long hd = self.pool.head_dim
        if s.is_bf16 or not d.is_bf16 or s.width != (self.n_heads + 2 * self.pool.n_kv_heads) * hd or d.width != self.n_heads * hd:
            raise ValueError(f"q|k|v slot of {s.width} and q slot of {d.width} do not fit {self.n_heads} heads of {hd}")
        cdef pace_op *op = self.add(PACE_ROPE_KV, tier)
        op.u.rope.qkv, op.u.rope.ldx = <const float *>s.data, s.ld
        op.u.rope.q, op.u.rope.ldq = <bf16 *>d.data, d.ld
        if rotary_dim:
            if rotary_dim > hd or rotary_dim % 2 or self.at(cos).width != rotary_dim // 2:
                raise ValueError(f"rotary_dim is {rotary_dim} with head_dim {hd}")
            op.u.rope.cos, op.u.rope.sin = <const float *>self.at(cos).data, <const float *>self.at(sin).data
        op.u.rope.rotary_dim, op.u.rope.interleaved = rotary_dim, interleaved
        op.u.rope.q_norm, op.u.rope.k_norm = self.vector(q_norm, hd), self.vector(k_norm, hd)
        op.u.rope.norm_kind, op.u.rope.norm_eps = norm_kind, norm_eps
        op.u.rope.kv = self.kv(layer)

    def add_attention(self, tier, int src, int dst, long layer, float scale, float softcap, long window, sinks):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        cdef long width = self.n_heads * self.pool.head_dim
        if not s.is_bf16 or not d.is_bf16 or s.width != width or d.width != width:
            raise ValueError(f"attention slots must be bf16 and {width} wide")
        if self.n_heads % self.pool.n_kv_heads or self.n_heads // self.pool.n_kv_heads > 64:
            raise ValueError(f"{self.n_heads} query heads over {self.pool.n_kv_heads} kv heads: at most 64 to one")
        cdef pace_op *op = self.add(PACE_ATTENTION, tier)
        op.u.attention.q, op.u.attention.ldq = <const bf16 *>s.data, s.ld
        op.u.attention.out, op.u.attention.ldo = <bf16 *>d.data, d.ld
        op.u.attention.scale, op.u.attention.softcap, op.u.attention.window = scale, softcap, window
        op.u.attention.sinks = self.vector(sinks, self.n_heads)
        op.u.attention.kv = self.kv(layer)

    def add_select(self, tier, int src, int dst):
        cdef slot *s = self.at(src)
        cdef slot *d = self.at(dst)
        if s.width != d.width or s.is_bf16 != d.is_bf16 or s.logits or not d.logits:
            raise ValueError("select wants two slots of one shape, from token rows to logit rows")
        cdef pace_op *op = self.add(PACE_SELECT, tier)
        cdef size_t size = 2 if s.is_bf16 else 4
        op.logits = 1
        op.u.select.src, op.u.select.dst, op.u.select.row_bytes = s.data, d.data, s.width * size
        op.u.select.src_stride, op.u.select.dst_stride = s.ld * size, d.ld * size

    def view(self, int i):
        """All rows of a slot as f32 or uint16 [rows, width], no copy; the array keeps the memory alive."""
        cdef slot *s = self.at(i)
        a = np.frombuffer(self.memory[i], np.uint16 if s.is_bf16 else np.float32)
        rows = self.p.max_logits if s.logits else self.p.max_tokens
        return a[: rows * s.ld].reshape(rows, s.ld)[:, : s.width]

    def step(self, const int32_t[::1] token_ids, const int32_t[::1] q_start, const int32_t[::1] kv_len,
             const int32_t[:, ::1] block_tables, const int32_t[::1] logit_rows):
        cdef pace_batch b
        cdef long s, i, n_seqs = kv_len.shape[0], n = token_ids.shape[0], last = -1, q_len, need
        if not 1 <= n <= self.p.max_tokens or not 1 <= n_seqs <= self.p.max_seqs or logit_rows.shape[0] > self.p.max_logits:
            raise ValueError(f"step of {n} tokens, {n_seqs} sequences, {logit_rows.shape[0]} logit rows; the plan holds "
                             f"{self.p.max_tokens}, {self.p.max_seqs}, {self.p.max_logits}")
        if q_start.shape[0] != n_seqs + 1 or block_tables.shape[0] < n_seqs or q_start[0] != 0 or q_start[n_seqs] != n:
            raise ValueError("q_start must run from 0 to the number of tokens, one entry per sequence and one more")
        for s in range(n_seqs):
            q_len = q_start[s + 1] - q_start[s]
            if q_len < 1 or kv_len[s] < q_len:
                raise ValueError(f"sequence {s} has {q_len} rows and kv_len {kv_len[s]}")
            need = (kv_len[s] + self.pool.block_size - 1) // self.pool.block_size
            if self.pool.contiguous:
                if block_tables.shape[1] != 1:
                    raise ValueError(f"a contiguous pool wants tables of 1 column, the first block, got {block_tables.shape[1]}")
                if not 0 <= block_tables[s, 0] <= self.pool.n_blocks - need:
                    raise ValueError(f"sequence {s} needs {need} blocks from {block_tables[s, 0]} on, there are {self.pool.n_blocks}")
                continue
            if need > block_tables.shape[1]:
                raise ValueError(f"sequence {s} of length {kv_len[s]} needs {need} blocks, its table has {block_tables.shape[1]}")
            for i in range(need):
                if not 0 <= block_tables[s, i] < self.pool.n_blocks:
                    raise ValueError(f"sequence {s} names block {block_tables[s, i]} of {self.pool.n_blocks}")
        for i in range(n):
            if not 0 <= token_ids[i] < self.vocab_size:
                raise ValueError(f"token id {token_ids[i]} at row {i}, the vocabulary has {self.vocab_size}")
        for i in range(logit_rows.shape[0]):
            if not last < logit_rows[i] < n:
                raise ValueError(f"logit_rows must ascend below {n}, got {logit_rows[i]} after {last}")
            last = logit_rows[i]
        b.token_ids, b.q_start, b.kv_len = &token_ids[0], &q_start[0], &kv_len[0]
        b.block_tables, b.table_stride = &block_tables[0, 0], block_tables.shape[1]
        b.logit_rows = &logit_rows[0] if logit_rows.shape[0] else NULL
        b.n_tokens, b.n_seqs, b.n_logits = n, n_seqs, logit_rows.shape[0]
        cdef int e
        if self.team.team == NULL:
            raise RuntimeError("the thread team is closed")
        with nogil:
            e = pace_plan_step(&self.p, &b)
        check_run(e)

    def op_seconds(self):
        return [self.p.op_s[i] for i in range(self.p.n_ops)]


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

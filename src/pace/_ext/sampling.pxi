# Part of _kernels.pyx: draws and log probabilities of a batch of logits.

cdef extern from "sampler.h" nogil:
    float PACE_LEAST_TEMPERATURE
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
        const uint32_t *mask
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
    long n_top  # columns of the results' top_ids and top_logprobs
    const int32_t *given  # tokens to score; NULL: draw them
    const pace_sample_params *params
    pace_sample_result *results
    int32_t *errors
    pace_work work


cdef void sample_worker(void *arg, int tid, pace_team *team) noexcept nogil:
    cdef sample_job *j = <sample_job *>arg
    cdef long i = 0, end = 0, top
    cdef void *scratch = pace_team_scratch(team, tid)
    cdef pace_sample_result *r
    while pace_work_next(&j.work, tid, 1, &i, &end):
        r = &j.results[i]
        if j.given != NULL:
            j.errors[i] = pace_logprobs_row(j.kernels, j.logits + i * j.stride, j.vocab, j.given[i], j.n_logprobs, r,
                                            scratch)
            top = j.n_logprobs
        else:
            j.errors[i] = pace_sample_row(j.kernels, j.logits + i * j.stride,
                                          j.block_max + i * j.n_blocks if j.block_max != NULL else NULL, j.vocab,
                                          &j.params[i], r, scratch)
            top = max(j.params[i].n_logprobs, 0)
        for top in range(0 if j.errors[i] else top, j.n_top):  # a result that is used again holds another step's
            r.top_ids[top], r.top_logprobs[top] = -1, 0.0


cdef int32_t point(const int32_t[::1] ids, const int32_t **start) except -1:
    """Its length; start: its first element, NULL where there is none."""
    start[0] = &ids[0] if ids.shape[0] else NULL
    return <int32_t>ids.shape[0]


cdef int run_rows(Team team, sample_job *job, const float[:, :] logits, int32_t[:, ::1] top_ids,
                  float[:, ::1] top_logprobs, int32_t[::1] errors) except -1:
    """Draw or score every row; job.params or job.given, and room for the results, are the caller's."""
    cdef long i, n = logits.shape[0]
    cdef int e
    if errors.shape[0] != n or top_ids.shape[0] != n or top_logprobs.shape[0] != n or top_ids.shape[1] != top_logprobs.shape[1]:
        raise ValueError(f"results for {n} rows: errors [{errors.shape[0]}], top_ids [{top_ids.shape[0]}, {top_ids.shape[1]}] "
                         f"and top_logprobs [{top_logprobs.shape[0]}, {top_logprobs.shape[1]}] do not fit")
    if logits.shape[1] > 1 and logits.strides[1] != 4:
        raise ValueError("the columns of the logits are not side by side")
    if logits.shape[1] > INT_MAX or logits.strides[0] % 4:
        raise ValueError(f"logits have {logits.shape[1]} columns in rows {logits.strides[0]} bytes apart")
    job.kernels = current
    job.logits, job.stride = &logits[0, 0], logits.strides[0] // 4
    job.errors = &errors[0]
    job.n_top = top_ids.shape[1]
    for i in range(n):
        job.results[i].top_ids, job.results[i].top_logprobs = &top_ids[i, 0], &top_logprobs[i, 0]
    if pace_work_init(&job.work, team.n_threads):
        raise MemoryError("cannot allocate the sampling batch")
    pace_work_arm_all(&job.work, n)
    with nogil:
        e = pace_team_run_with(team.team, sample_worker, <void *>job, pace_sample_scratch(job.vocab))
    pace_work_destroy(&job.work)
    return check_run(e)


def most_logprobs(const sample_record[::1] params):
    """Columns of the results: the largest n_logprobs, at least 1. (numpy's max costs 20 us after a step has emptied
    the caches of the interpreter.)"""
    cdef long i
    cdef int32_t most = 1
    for i in range(params.shape[0]):
        most = max(most, params[i].n_logprobs)
    return most


def sample(Team team not None, const float[:, :] logits, maxima, const sample_record[::1] params, history,
           int32_t[::1] tokens, float[::1] logprobs, int32_t[::1] ranks, int32_t[:, ::1] top_ids,
           float[:, ::1] top_logprobs, int32_t[::1] errors):
    cdef long i, n = logits.shape[0]
    cdef const float[::1] bias
    cdef const float[:, ::1] block_max
    cdef const uint32_t[::1] mask
    cdef pace_sample_params *p
    cdef sample_job job
    team.check_open()
    if not n:
        return
    if params.shape[0] != n or len(history) != n:
        raise ValueError(f"{n} rows of logits, {params.shape[0]} of parameters, {len(history)} of history")
    if tokens.shape[0] != n or logprobs.shape[0] != n or ranks.shape[0] != n:
        raise ValueError(f"results for {n} rows: tokens [{tokens.shape[0]}], logprobs [{logprobs.shape[0]}] and ranks "
                         f"[{ranks.shape[0]}] do not fit")
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
            if p[i].temperature != 0 and not p[i].temperature >= PACE_LEAST_TEMPERATURE:
                raise ValueError(f"row {i} has temperature {p[i].temperature}, expected 0 (greedy) or "
                                 f"{PACE_LEAST_TEMPERATURE:.0e} and more")
            if p[i].n_logprobs > top_ids.shape[1] or p[i].n_logprobs > job.vocab:
                raise ValueError(f"row {i} asks for {p[i].n_logprobs} logprobs, there is room for {top_ids.shape[1]}")
            row = history[i]
            if row is None:
                continue
            row = tuple(row)
            held.append(row)
            prompt, output, banned, bias_ids, values, allowed = row[:6]
            if len(row) > 6 and row[6] is not None:
                mask = row[6]
                if mask.shape[0] != (job.vocab + 31) // 32:
                    raise ValueError(f"row {i} has a mask of {mask.shape[0]} words for {job.vocab} columns")
                p[i].mask = &mask[0]
            p[i].n_prompt = point(prompt, &p[i].prompt)
            p[i].n_output = point(output, &p[i].output)
            p[i].n_banned = point(banned, &p[i].banned)
            p[i].n_bias = point(bias_ids, &p[i].bias_ids)
            p[i].n_allowed = point(allowed, &p[i].allowed)
            bias = values
            if bias.shape[0] != p[i].n_bias:
                raise ValueError(f"row {i} has {bias.shape[0]} biases for {p[i].n_bias} ids")
            p[i].bias = &bias[0] if bias.shape[0] else NULL
        run_rows(team, &job, logits, top_ids, top_logprobs, errors)
        for i in range(n):
            tokens[i], logprobs[i], ranks[i] = job.results[i].token, job.results[i].logprob, job.results[i].rank
    finally:
        PyMem_Free(<void *>job.params)
        PyMem_Free(job.results)


def logprobs(Team team not None, const float[:, :] logits, const int32_t[::1] tokens, int n_logprobs,
             float[::1] logprobs, int32_t[::1] ranks, int32_t[:, ::1] top_ids, float[:, ::1] top_logprobs,
             int32_t[::1] errors):
    cdef long i, n = logits.shape[0]
    cdef sample_job job
    team.check_open()
    if tokens.shape[0] != n or logprobs.shape[0] != n or ranks.shape[0] != n:
        raise ValueError(f"{n} rows of logits, {tokens.shape[0]} tokens, results for {logprobs.shape[0]} and {ranks.shape[0]}")
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
        run_rows(team, &job, logits, top_ids, top_logprobs, errors)
        for i in range(n):
            logprobs[i], ranks[i] = job.results[i].logprob, job.results[i].rank
    finally:
        PyMem_Free(job.results)
